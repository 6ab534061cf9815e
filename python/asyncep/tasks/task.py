"""A classification made ready: the prompt around a text, the labels' tokens, the calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypedDict

from asyncep.client.errors import OptionError
from asyncep.client.labels import LabelScores, LabelSet, Length
from asyncep.tasks.results import Classification
from asyncep.tasks.scoring import decide, decide_each, together
from asyncep.tasks.template import DESCRIPTION_PLACE, DESCRIPTIONS_PLACE, Template, default_template

Truncate = Literal["head", "tail", "middle"]
# What is asked for of each label where a text may have several.
ANSWERS = ("yes", "no")
_THRESHOLD = 0.5


@dataclass(frozen=True)
class TaskOptions:
    """What a caller can say about a classification.

    Attributes:
        labels: what to choose from, at least two; one will do with `multi_label`.
        template: the prompt, with ``{text}`` once, and ``{labels}`` or ``{descriptions}`` if wanted. With `multi_label`
            it is the question on one label, with ``{label}``, and ``{description}`` if wanted.
        examples: (text, label) pairs shown before each text (few-shot).
        calibrate: neutral texts, such as ``N/A``, whose mean score is subtracted from each label's.
        chat: write the prompt as a user's turn in the model's chat format.
        system: a system message before it; needs `chat`.
        length: ``sum`` for a label's full log-likelihood, ``mean`` for it divided by the label's tokens.
        descriptions: what the prompt says of labels, by label.
        words: what the model may write for a label, by label; the label itself where there are none. A label's
            probability is that of all its words.
        multi_label: a text may have several labels, or none: each is asked about by itself, yes or no.
        threshold: with `multi_label`, from which probability on a label applies (0.5); or by label.
        other_below: a text whose most probable label has a lower probability gets the label `other`.
        other: see `other_below`.
        truncate: which part of a text is left out where the prompt is longer than the model takes: its ``head``, its
            ``tail`` or its ``middle``. Without it such a text is an error.
    """

    labels: Sequence[str]
    template: str | None = None
    examples: Sequence[tuple[str, str]] = ()
    calibrate: Sequence[str] = ()
    chat: bool = False
    system: str | None = None
    length: Length = "sum"
    descriptions: Mapping[str, str] = field(default_factory=dict)
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    multi_label: bool = False
    threshold: float | Mapping[str, float] | None = None
    other_below: float | None = None
    other: str = "other"
    truncate: Truncate | None = None

    @property
    def prompt(self) -> str:
        """The template, or the default one for these options."""
        described = bool(self.descriptions)
        return default_template(described=described, multi=self.multi_label) if self.template is None else self.template

    @property
    def outcomes(self) -> tuple[str, ...]:
        """Every label that a text can get."""
        extra = (self.other,) if self.other_below is not None and self.other not in self.labels else ()
        return (*self.labels, *extra)

    def templates(self) -> tuple[Template, ...]:
        """The prompt, or with `multi_label` that of each label.

        Raises:
            TemplateError: a place is missing or repeated.
        """
        known = self.descriptions
        if self.multi_label:
            # Of the default questions, that with a description is for the labels that have one.
            texts = [self.template or default_template(described=label in known, multi=True) for label in self.labels]
            return tuple(
                Template.question(text, label, self.labels, known)
                for text, label in zip(texts, self.labels, strict=True)
            )
        # An example ends as the model is to end: with what is scored.
        shots = [(text, self.words.get(label, (label,))[0]) for text, label in self.examples]
        return (Template.parse(self.prompt, self.labels, shots, known),)

    def written(self) -> list[tuple[str, ...]]:
        """What the model may write, for each outcome that is scored: the words of each label, or yes and no."""
        if self.multi_label:
            return [(answer,) for answer in ANSWERS]
        return [tuple(self.words.get(label, (label,))) for label in self.labels]

    def threshold_of(self, label: str) -> float:
        """From which probability on a label applies."""
        if isinstance(self.threshold, Mapping):
            return self.threshold.get(label, _THRESHOLD)
        return _THRESHOLD if self.threshold is None else self.threshold

    def check(self) -> None:
        """Refuses what cannot be asked.

        Raises:
            OptionError: naming the argument.
        """
        fewest, words = (1, "one is") if self.multi_label else (2, "two different ones are")
        if len(self.labels) < fewest or len(set(self.labels)) != len(self.labels):
            raise OptionError(f"labels: at least {words} needed, each once, not {_shown(self.labels)}")
        if blank := [label for label in self.labels if not label.strip()]:
            raise OptionError(f"labels: {blank[0]!r} has no letters")
        self._check_texts()
        self._check_by_label()
        self._check_together()
        if self.descriptions:
            place = DESCRIPTION_PLACE if self.multi_label else DESCRIPTIONS_PLACE
            if place not in self.prompt:
                raise OptionError(f"template: labels have descriptions, and the prompt does not show them; add {place}")
        self.templates()
        for text, label in self.examples:
            if label not in self.labels:
                raise OptionError(f"examples: {text[:40]!r} has the label {label!r}, which is not among the labels")

    def _check_texts(self) -> None:
        written = {
            "labels": self.labels,
            "template": [self.template or ""],
            "system": [self.system or ""],
            "other": [self.other],
            "calibrate": self.calibrate,
            "descriptions": [*self.descriptions, *self.descriptions.values()],
            "words": [word for words in self.words.values() for word in words],
            "examples": [part for example in self.examples for part in example],
        }
        for name, texts in written.items():
            if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
                raise OptionError(f"{name}: half of a surrogate pair, which is no character; is its encoding right?")

    def _check_by_label(self) -> None:
        thresholds = self.threshold if isinstance(self.threshold, Mapping) else {}
        tables: dict[str, Mapping[str, object]] = {
            "descriptions": self.descriptions,
            "words": self.words,
            "threshold": thresholds,
        }
        for name, table in tables.items():
            if unknown := [label for label in table if label not in self.labels]:
                raise OptionError(f"{name}: {unknown[0]!r} is not among the labels")
        for label, words in self.words.items():
            if not words or not all(word.strip() for word in words):
                raise OptionError(f"words: {label!r}: at least one word is needed, and none without letters")
        numbers = [*thresholds.values()] if isinstance(self.threshold, Mapping) else [self.threshold]
        for name, values in (("threshold", numbers), ("other_below", [self.other_below])):
            if wrong := [value for value in values if value is not None and not 0 <= value <= 1]:
                raise OptionError(f"{name}: a number from 0 to 1 is needed, not {wrong[0]}")

    def _check_together(self) -> None:
        if self.system is not None and not self.chat:
            raise OptionError("system: only a chat has a system message; give chat=True too")
        if self.multi_label:
            if self.examples:
                raise OptionError("examples: not with multi_label, where each label is a question of its own")
            if self.words:
                raise OptionError("words: not with multi_label, where the model writes yes or no")
            if self.other_below is not None:
                raise OptionError("other_below: not with multi_label, where a text may have no label at all")
        elif self.threshold is not None:
            raise OptionError("threshold: only with multi_label; other_below is for texts of which no label is sure")
        if self.other_below is not None and not self.other.strip():
            raise OptionError(f"other: {self.other!r} has no letters")


class PromptOptions(TypedDict, total=False):
    """The same as keyword arguments, the labels apart; see `TaskOptions`. ``calibrate`` may be one text."""

    template: str | None
    examples: Sequence[tuple[str, str]]
    calibrate: str | Sequence[str]
    chat: bool
    system: str | None
    length: Length
    descriptions: Mapping[str, str]
    words: Mapping[str, Sequence[str]]
    multi_label: bool
    threshold: float | Mapping[str, float] | None
    other_below: float | None
    other: str
    truncate: Truncate | None


@dataclass(frozen=True, slots=True)
class TextScores:
    """What the model said of one text.

    Attributes:
        scores: log-likelihood of everything that it may write (`TaskOptions.written`), after each of the text's
            prompts, in nats.
        tokens, cached: of all passes, and of them from the prefix cache.
        cut: characters of the text that were left out.
    """

    scores: tuple[float, ...]
    tokens: int = 0
    cached: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Task:
    """Ready to score texts.

    Attributes:
        options: what was asked.
        templates: what stands around a text: one prompt, or one for each label.
        label_set: the tokens of everything that the model may write.
        special: whether the tokenizer adds its special tokens (a chat format has written them itself).
        offsets: calibration of each of `values`, see `scoring.offsets_of`.
    """

    options: TaskOptions
    templates: tuple[Template, ...]
    label_set: LabelSet
    special: bool
    offsets: tuple[float, ...] | None = None

    def join(self, answers: Sequence[LabelScores | str], cut: int = 0) -> TextScores | str:
        """A text's scores, of the answers to its prompts; the reason of the first that has none."""
        scores: list[float] = []
        for answer in answers:
            if isinstance(answer, str):
                return answer
            scores += answer.scores
        found = [answer for answer in answers if isinstance(answer, LabelScores)]
        return TextScores(tuple(scores), sum(a.tokens for a in found), sum(a.cached for a in found), cut)

    def values(self, scores: Sequence[float]) -> list[float]:
        """The log-likelihood of each label, or of yes and no for each, out of those of all words."""
        if len(self._counts) == len(scores):
            return list(scores)
        values, start = [], 0
        for count in self._counts:
            values.append(together(scores[start : start + count]))
            start += count
        return values

    @cached_property
    def _counts(self) -> list[int]:
        """How many scores make one value, for each of `values`."""
        return [len(words) for words in self.options.written()] * len(self.templates)

    def decide(self, scores: TextScores | str) -> Classification:
        """The answer that follows from a text's scores, or from the reason why it has none."""
        if isinstance(scores, str):
            return Classification(None, error=scores)
        options, values = self.options, self.values(scores.scores)
        if options.multi_label:
            found = decide_each(values, options.labels, self.offsets)
            chosen = tuple(label for label, p in found.probabilities.items() if p >= options.threshold_of(label))
            label = found.label
        else:
            found = decide(values, options.labels, self.offsets)
            label = found.label
            if options.other_below is not None and found.probabilities[label] < options.other_below:
                label = options.other
            chosen = (label,)
        return Classification(
            label,
            found.probabilities,
            found.log_probabilities,
            scores.tokens,
            scores.cached,
            labels=chosen,
            cut_characters=scores.cut,
            label_mass=self.mass(scores.scores),
        )

    def mass(self, scores: Sequence[float]) -> float | None:
        """Probability that the model writes one of the labels; of several prompts, the mean."""
        if self.label_set.length != "sum":
            return None
        return sum(map(math.exp, scores)) / len(self.templates)


def _shown(labels: Sequence[str]) -> str:
    shown = ", ".join(map(repr, labels[:5]))
    return f"{shown}, … ({len(labels)})" if len(labels) > 5 else shown or "none"
