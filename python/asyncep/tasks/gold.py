"""True labels as a file has them, held against the labels that were asked for. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any


def label_text(value: Any) -> str | None:
    """A true label as its text: 1.0 is the label 1, and a truth value is as JSON writes it.

    Several labels, as a list, are one JSON array. Nothing, and what a table leaves empty, is none.
    """
    if value is None or (isinstance(value, str) and not value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, list):
        return json.dumps([text for entry in value if (text := label_text(entry)) is not None], ensure_ascii=False)
    return str(value)


def several(gold: str) -> list[str]:
    """The labels of a row that may have several: a JSON array, or with semicolons between them."""
    if gold.startswith("["):
        try:
            found = json.loads(gold)
        except ValueError:
            found = None
        if isinstance(found, list):
            return [text for entry in found if (text := label_text(entry)) is not None]
    return [part.strip() for part in gold.split(";") if part.strip()]


def as_label(gold: str | None, labels: Collection[str]) -> str | None:
    """The label that a true label's text means: itself, or the same number, or truth value, written otherwise."""
    if gold is None or gold in labels:
        return gold
    stripped = gold.strip()
    truth = [stripped.lower(), stripped.capitalize()] if stripped.lower() in ("true", "false") else []
    return next((text for text in (stripped, _whole(stripped), *truth) if text in labels), gold)


def _whole(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if math.isfinite(value) and value.is_integer() else text
