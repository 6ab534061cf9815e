"""A classification made ready: the prompt around a text, the labels' tokens, the calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from asyncep.client.errors import OptionError
from asyncep.client.labels import LabelScores, LabelSet, Length
from asyncep.tasks.results import Classification
from asyncep.tasks.scoring import decide
from asyncep.tasks.template import DEFAULT, Template


@dataclass(frozen=True)
class TaskOptions:
    """What a caller can say about a classification.

    Attributes:
        labels: what to choose from, at least two.
        template: the prompt, with ``{text}`` once and ``{labels}`` if wanted.
        examples: (text, label) pairs shown before each text (few-shot).
        calibrate: neutral texts, such as ``N/A``, whose mean score is subtracted from each label's.
        chat: write the prompt as a user's turn in the model's chat format.
        system: a system message before it; needs `chat`.
        length: ``sum`` for a label's full log-likelihood, ``mean`` for it divided by the label's tokens.
    """

    labels: Sequence[str]
    template: str = DEFAULT
    examples: Sequence[tuple[str, str]] = ()
    calibrate: Sequence[str] = ()
    chat: bool = False
    system: str | None = None
    length: Length = "sum"

    def check(self) -> None:
        """Refuses what cannot be asked.

        Raises:
            OptionError: naming the argument.
        """
        if len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
            raise OptionError(f"labels: at least two different ones are needed, not {list(self.labels)}")
        Template.parse(self.template, list(self.labels))
        for text, label in self.examples:
            if label not in self.labels:
                raise OptionError(f"examples: {text[:40]!r} has the label {label!r}, which is not among the labels")
        if self.system is not None and not self.chat:
            raise OptionError("system: only a chat has a system message; give chat=True too")


class PromptOptions(TypedDict, total=False):
    """The same as keyword arguments, the labels apart; see `TaskOptions`. ``calibrate`` may be one text."""

    template: str
    examples: Sequence[tuple[str, str]]
    calibrate: str | Sequence[str]
    chat: bool
    system: str | None
    length: Length


@dataclass(frozen=True)
class Task:
    """Ready to score texts.

    Attributes:
        labels: their names.
        label_set: their tokens.
        template: what stands around a text.
        special: whether the tokenizer adds its special tokens (a chat format has written them itself).
        offsets: calibration, see `scoring.offsets_of`.
    """

    labels: tuple[str, ...]
    label_set: LabelSet
    template: Template
    special: bool
    offsets: Mapping[str, float] | None = None

    def decide(self, scores: LabelScores | str) -> Classification:
        """The answer that follows from a text's scores, or from the reason why it has none."""
        if isinstance(scores, str):
            return Classification(None, error=scores)
        found = decide(scores.scores, self.labels, self.offsets)
        return Classification(found.label, found.probabilities, found.log_probabilities, scores.tokens, scores.cached)
