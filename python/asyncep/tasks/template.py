"""The prompt: an instruction all rows share, then the row's text. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from asyncep.client.errors import OptionError

TEXT_PLACE = "{text}"
LABELS_PLACE = "{labels}"
DESCRIPTIONS_PLACE = "{descriptions}"
LABEL_PLACE = "{label}"
DESCRIPTION_PLACE = "{description}"
DEFAULT = "Classify the text into one of these labels: {labels}.\n\nText: {text}\nLabel:"
DEFAULT_DESCRIBED = "Classify the text into one of these labels.\n\n{descriptions}\n\nText: {text}\nLabel:"
# One question a label; what stands before it is the same for all labels of a text, and computed once.
DEFAULT_MULTI = (
    'Decide whether a label applies to the text.\n\nText: {text}\n\nDoes the label "{label}" apply, yes or no?\nAnswer:'
)
DEFAULT_MULTI_DESCRIBED = (
    "Decide whether a label applies to the text.\n\nText: {text}\n\n"
    'Does the label "{label}" ({description}) apply, yes or no?\nAnswer:'
)


class TemplateError(OptionError):
    """The template cannot be used; the message says why."""


@dataclass(frozen=True)
class Template:
    """What stands before and after a row's text. Everything before it is computed once a rank, not once a row.

    Attributes:
        before: the shared prefix: instruction and examples.
        after: what follows the text, up to where the label is read.
        joiner: what the model would write between the prompt and a label: a space, or nothing after white space and
            in a turn of its own.
    """

    before: str
    after: str
    joiner: str = " "

    @classmethod
    def parse(
        cls,
        text: str,
        labels: Sequence[str],
        examples: Sequence[tuple[str, str]] | None = None,
        descriptions: Mapping[str, str] | None = None,
        more: Mapping[str, str] | None = None,
    ) -> Template:
        """Reads a template with one ``{text}``.

        ``{labels}`` stands for the labels with commas between them, ``{descriptions}`` for a line for each, with its
        description where it has one. A space at the template's end belongs to the label that follows: models have
        learned words with the space before them.

        Args:
            examples: (text, label) pairs shown before the row, rendered like it (few-shot).
            descriptions: of labels, by label.
            more: further places, and what stands for them.

        Raises:
            TemplateError: no ``{text}``, or several.
        """
        if text.count(TEXT_PLACE) != 1:
            raise TemplateError(
                f"template: {TEXT_PLACE} is needed exactly once; it stands there {text.count(TEXT_PLACE)} times"
            )
        shown = {LABELS_PLACE: ", ".join(labels), DESCRIPTIONS_PLACE: _lines(labels, descriptions or {})}
        places = {**shown, **(more or {})}
        before, after = (_filled(part, places) for part in text.split(TEXT_PLACE))
        end = cls.around(before, after)
        if examples:
            # The instruction is said once; each example and the row repeat only what surrounds a text.
            instruction, separator, lead = before.rpartition("\n\n")
            shots = "".join(f"{lead}{shown}{end.after}{end.joiner}{label}\n\n" for shown, label in examples)
            return replace(end, before=f"{instruction}{separator}{shots}{lead}")
        return end

    @classmethod
    def question(
        cls, text: str, label: str, labels: Sequence[str], descriptions: Mapping[str, str] | None = None
    ) -> Template:
        """The prompt that asks whether one of the labels applies: ``{label}`` and ``{description}`` stand for it.

        Raises:
            TemplateError: no ``{text}``, or several, or no ``{label}``.
        """
        if LABEL_PLACE not in text:
            raise TemplateError(
                f"template: {LABEL_PLACE} is needed with several labels a text: each label is a question of its own"
            )
        known = descriptions or {}
        more = {LABEL_PLACE: label, DESCRIPTION_PLACE: known.get(label, "")}
        return cls.parse(text, labels, descriptions=known, more=more)

    @classmethod
    def around(cls, before: str, after: str) -> Template:
        """A prompt by what stands before and after the text; a space at its end belongs to the label."""
        end, joiner = _ending(after)
        return cls(before, end, joiner)

    def in_chat(self, before: str, after: str) -> Template:
        """The same prompt as a user's turn: what stands around it there. The label is the first of the next turn."""
        end, joiner = _ending(after)
        return Template(before, end, joiner if end != after else "")

    def render(self, text: str) -> str:
        """The whole prompt for one text."""
        return f"{self.before}{text}{self.after}"


def default_template(*, described: bool, multi: bool) -> str:
    """The prompt where none is given."""
    if multi:
        return DEFAULT_MULTI_DESCRIBED if described else DEFAULT_MULTI
    return DEFAULT_DESCRIBED if described else DEFAULT


def read_examples(path: Path, *, text_field: str, gold_field: str) -> list[tuple[str, str]]:
    """Few-shot examples from a JSONL file.

    Raises:
        TemplateError: a line that is not an object with both fields.
    """
    examples = []
    # Line feeds alone end lines: str.splitlines knows characters that may stand in a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            examples.append((str(fields[text_field]), str(fields[gold_field])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TemplateError(
                f"{path}:{number}: an example needs {text_field!r} and {gold_field!r} ({type(error).__name__})"
            ) from error
    return examples


def read_template(path: Path) -> str:
    """A template from a file. The line break that editors put at a file's end is not part of it.

    Raises:
        TemplateError: see `read_text`.
    """
    text = read_text(path)
    return text.removesuffix("\n").removesuffix("\r")


def read_text(path: Path) -> str:
    """A file's text, without a byte-order mark.

    Raises:
        TemplateError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise TemplateError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from error


def _filled(text: str, places: Mapping[str, str]) -> str:
    """The text with its places filled, each once: what stands for one may look like another."""
    return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)


def _lines(labels: Sequence[str], descriptions: Mapping[str, str]) -> str:
    return "\n".join(
        f"- {label}: {descriptions[label]}" if descriptions.get(label) else f"- {label}" for label in labels
    )


def _ending(after: str) -> tuple[str, str]:
    """The prompt's end without a last space, and what stands between it and a label."""
    if after.endswith(" "):
        return after[:-1], " "
    return after, "" if after[-1:].isspace() else " "
