"""The columns that results have in a frame or a table: which, of what kind, and their values. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from asyncep.tasks.results import Classification
from asyncep.tasks.task import TaskOptions

ColumnKind = Literal["text", "texts", "number", "count"]


def result_columns(options: TaskOptions) -> dict[str, ColumnKind]:
    """Names and kinds, in their order."""
    columns: dict[str, ColumnKind] = {"labels": "texts"} if options.multi_label else {"label": "text"}
    if not options.multi_label:
        columns["probability"] = "number"
    columns.update({f"p_{label}": "number" for label in options.labels})
    if options.truncate is not None:
        columns["cut_characters"] = "count"
    columns["error"] = "text"
    return columns


def column_values(results: Sequence[Classification], options: TaskOptions) -> dict[str, list[Any]]:
    """The values of each of them, in the order of the results; None for all but the error of a text without answer."""
    found: dict[str, list[Any]] = {name: [] for name in result_columns(options)}
    for result in results:
        for name, values in found.items():
            values.append(_value(result, name))
    return found


def _value(result: Classification, name: str) -> Any:
    if name == "error":
        return result.error
    if result.label is None:
        return None
    if name == "labels":
        return list(result.labels)
    if name.startswith("p_"):
        return result.probabilities.get(name[2:])
    return {"label": result.label, "probability": result.probability, "cut_characters": result.cut_characters}[name]
