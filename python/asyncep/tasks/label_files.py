"""Labels as people write them: a list with commas, a file of lines, or JSON and YAML with what is known of each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncep.client.errors import OptionError
from asyncep.tasks.template import read_text

_KEYS = frozenset(("label", "description", "words", "threshold"))


@dataclass(frozen=True)
class Labels:
    """Labels, and what is known of some of them, by name.

    Attributes:
        names: in their order.
        descriptions: what the prompt says of a label.
        words: what the model may write for a label; the name itself where there are none.
        thresholds: from which probability on a label is given (several labels a text).
    """

    names: tuple[str, ...]
    descriptions: dict[str, str] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)


def labels_in(text: str) -> Labels:
    """Labels with commas between them, as a line of CSV: one with a comma in it stands in quotes.

    Raises:
        OptionError: a quote that is not closed.
    """
    try:
        [*rows] = csv.reader([text.strip()], skipinitialspace=True, strict=True)
    except csv.Error as error:
        raise OptionError(f"labels: {text!r}: {error}; a label with a comma in it stands in double quotes") from error
    return labels_from([name.strip() for row in rows for name in row if name.strip()], "labels")


def read_labels(path: Path) -> Labels:
    """Labels from a file: ``.json``, ``.yaml`` or ``.yml``, else a label a line.

    JSON and YAML hold a list, of names or of objects with ``label`` and, if wanted, ``description``, ``words`` and
    ``threshold``; or one object, from each label to its description or such an object.

    Raises:
        OptionError: names the file and the entry.
    """
    text = read_text(path)
    ending = path.suffix.lower()
    if ending not in (".json", ".yaml", ".yml"):
        return labels_from([line.strip() for line in text.splitlines() if line.strip()], str(path))
    try:
        if ending == ".json":
            found = json.loads(text)
        else:
            import yaml  # type: ignore[import-untyped] # no stubs in the environment

            found = yaml.safe_load(text)
    except ValueError as error:
        raise OptionError(f"{path}: not JSON: {error}") from error
    except Exception as error:  # what yaml raises has no common name outside it
        raise OptionError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return labels_from(found, str(path))


def labels_from(given: Any, where: str) -> Labels:
    """Labels from plain data, see `read_labels`.

    Args:
        where: what an error names.

    Raises:
        OptionError: names the entry.
    """
    if isinstance(given, Mapping):
        entries: Iterable[Any] = (
            {"label": name, **({"description": known} if isinstance(known, str) else _object(known, f"{where}.{name}"))}
            for name, known in given.items()
        )
    elif isinstance(given, list | tuple):
        entries = given
    else:
        raise OptionError(f"{where}: a list of labels, or an object with a label a key, is needed")
    found = Labels(())
    names: list[str] = []
    for number, entry in enumerate(entries):
        place = f"{where}[{number}]"
        known = entry if isinstance(entry, Mapping) else {"label": entry}
        if unknown := sorted(map(str, set(known) - _KEYS)):
            raise OptionError(f"{place}: {unknown[0]!r} is unknown; there are {', '.join(sorted(_KEYS))}")
        name = _string(known.get("label"), place if known is not entry else f"{place}.label")
        names.append(name)
        if (description := known.get("description")) is not None:
            found.descriptions[name] = _string(description, f"{place}.description")
        if (words := known.get("words")) is not None:
            listed = [words] if isinstance(words, str) else words
            if not isinstance(listed, list | tuple) or not listed:
                raise OptionError(f"{place}.words: a list of strings is needed, not {type(words).__name__}")
            found.words[name] = tuple(_string(word, f"{place}.words") for word in listed)
        if (threshold := known.get("threshold")) is not None:
            if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
                raise OptionError(f"{place}.threshold: a number from 0 to 1 is needed, not {threshold!r}")
            found.thresholds[name] = float(threshold)
    return Labels(tuple(names), found.descriptions, found.words, found.thresholds)


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(f"{place}: a description or an object is needed, not {type(value).__name__}")
    return value


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        # YAML reads yes, no and 1 as other things than words.
        raise OptionError(f"{place}: a string is needed, not {type(value).__name__}; put it in quotes")
    return str(value)
