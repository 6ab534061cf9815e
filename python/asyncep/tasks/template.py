"""The prompt: an instruction all rows share, then the row's text. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from asyncep.client.errors import OptionError

TEXT_PLACE = "{text}"
LABELS_PLACE = "{labels}"
DEFAULT = "Classify the text into one of these labels: {labels}.\n\nText: {text}\nLabel:"


class TemplateError(OptionError):
    """The template cannot be used; the message says why."""


@dataclass(frozen=True)
class Template:
    """What stands before and after a row's text. Everything before it is computed once a rank, not once a row.

    Attributes:
        before: the shared prefix: instruction and examples.
        after: what follows the text, up to where the label is read.
    """

    before: str
    after: str

    @classmethod
    def parse(cls, text: str, labels: list[str], examples: list[tuple[str, str]] | None = None) -> Template:
        """Reads a template with one ``{text}``; ``{labels}`` stands for the labels.

        Args:
            examples: (text, label) pairs shown before the row, rendered like it (few-shot).

        Raises:
            TemplateError: no ``{text}``, or several.
        """
        if text.count(TEXT_PLACE) != 1:
            raise TemplateError(
                f"template: {TEXT_PLACE} is needed exactly once; it stands there {text.count(TEXT_PLACE)} times"
            )
        before, after = text.replace(LABELS_PLACE, ", ".join(labels)).split(TEXT_PLACE)
        if examples:
            # The instruction is said once; each example and the row repeat only what surrounds a text.
            instruction, separator, lead = before.rpartition("\n\n")
            shots = "".join(f"{lead}{shown}{after} {label}\n\n" for shown, label in examples)
            before = f"{instruction}{separator}{shots}{lead}"
        return cls(before, after)

    def render(self, text: str) -> str:
        """The whole prompt for one text."""
        return f"{self.before}{text}{self.after}"


def read_examples(path: Path, *, text_field: str, gold_field: str) -> list[tuple[str, str]]:
    """Few-shot examples from a JSONL file.

    Raises:
        TemplateError: a line that is not an object with both fields.
    """
    examples = []
    # Line feeds alone end lines: str.splitlines knows characters that may stand in a JSON string.
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
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


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        TemplateError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: not UTF-8 ({error}); save the file as UTF-8") from error
