"""What the runtime answers with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


class _Plain:
    """An answer that can be written as JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """The attributes by name, as plain data."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # those that inherit are dataclasses


@dataclass(frozen=True, slots=True)
class Classification(_Plain):
    """One text's answer.

    Attributes:
        label: the most probable label, or the one for texts of which no label is sure (``other``); None if the text
            could not be classified.
        probabilities: of each label, normalised over the labels, after calibration; they sum to 1. With several labels
            a text each is that of the label by itself. Empty with an error.
        log_probabilities: log-likelihood of each label as the model has it, in nats, before calibration. With several
            labels a text, of the answer yes.
        tokens, cached_tokens: of all passes the text took, and of them from the prefix cache.
        error: why there is no label.
        labels: with several labels a text, those that apply; otherwise `label` alone. Empty with an error.
        cut_characters: how many characters of the text were left out, as ``truncate`` allows.
        label_mass: probability that the model writes one of the labels, before they are normalised. None where it is
            not known.
    """

    label: str | None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    log_probabilities: Mapping[str, float] = field(default_factory=dict)
    tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None
    labels: tuple[str, ...] = ()
    cut_characters: int = 0
    label_mass: float | None = None

    @property
    def probability(self) -> float | None:
        """Probability of `label`, or of the most probable label where it is ``other``; None with an error."""
        if self.label is None:
            return None
        found = self.probabilities.get(self.label)
        return max(self.probabilities.values(), default=math.nan) if found is None else found


@dataclass(frozen=True, slots=True)
class Score(_Plain):
    """One item's answer.

    Attributes:
        values: of each label token, in the order asked: probabilities over the label tokens where softmax was asked for
            (they sum to 1), else over the whole vocabulary. Empty with an error.
        log_probabilities: log-probability of each label token over the whole vocabulary, in nats.
        error: why there are none.
    """

    values: tuple[float, ...]
    log_probabilities: tuple[float, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Ranked(_Plain):
    """One document's place.

    Attributes:
        index: its number in the list that was given.
        document: itself.
        score: probability of "relevant" against "not relevant", 0 to 1; None with an error.
        error: why it has no score.
    """

    index: int
    document: str
    score: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TokenLogProbs(_Plain):
    """One prompt's answer.

    Attributes:
        log_probabilities: of each token asked for, as the next one after the prompt, in nats. Empty with an error.
        error: why there are none.
    """

    log_probabilities: tuple[float, ...]
    error: str | None = None
