"""Data frames in and out: pandas, polars and Arrow, told apart without importing those that are not in use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncep.batching.errors import OptionError
from asyncep.runtime.results import Classification

_LIBRARIES = ("pandas", "polars", "pyarrow")


def library_of(data: object) -> str | None:
    """``pandas``, ``polars`` or ``pyarrow`` if `data` is one of their frames or columns; None otherwise."""
    library = type(data).__module__.split(".")[0]
    return library if library in _LIBRARIES else None


def texts_of(data: Any, column: str) -> list[Any]:
    """The texts of a frame's column, or of a column by itself (a Series, an Array).

    Raises:
        OptionError: the frame has no such column.
    """
    if is_frame(data):
        names = list(data.column_names if library_of(data) == "pyarrow" else data.columns)
        if column not in names:
            raise OptionError(f"text={column!r}: the frame has no such column, only {', '.join(map(str, names))}")
        data = data[column]
    return list(data.to_pylist() if library_of(data) == "pyarrow" else data.to_list())


def with_results(data: Any, results: Sequence[Classification], labels: Sequence[str]) -> Any:
    """The frame with the columns ``label``, ``probability``, ``p_LABEL`` for each label and ``error`` added.

    A column by itself becomes a frame of these columns alone. The index of pandas stays.

    Raises:
        OptionError: the frame has one of these columns already.
    """
    columns: dict[str, list[Any]] = {
        "label": [result.label for result in results],
        "probability": [result.probability for result in results],
        **{f"p_{label}": [result.probabilities.get(label) for result in results] for label in labels},
        "error": [result.error for result in results],
    }
    library = library_of(data)
    if is_frame(data):
        names = set(data.column_names if library == "pyarrow" else data.columns)
        if taken := sorted(names & set(columns)):
            raise OptionError(f"the frame already has the column(s) {', '.join(taken)}; rename or drop them")
    if library == "pandas":
        import pandas  # type: ignore[import-untyped] # no stubs in the environment

        added = pandas.DataFrame(columns, index=data.index)
        return data.join(added) if is_frame(data) else added
    if library == "polars":
        import polars

        kinds = {name: polars.String if name in ("label", "error") else polars.Float64 for name in columns}
        added = polars.DataFrame(columns, schema=kinds)
        return data.hstack(added) if is_frame(data) else added
    import pyarrow

    kinds = {name: pyarrow.string() if name in ("label", "error") else pyarrow.float64() for name in columns}
    arrays = {name: pyarrow.array(values, kinds[name]) for name, values in columns.items()}
    if not is_frame(data):
        return pyarrow.table(arrays)
    table = pyarrow.table(data) if not isinstance(data, pyarrow.Table) else data
    for name, values in arrays.items():
        table = table.append_column(name, values)
    return table


def is_frame(data: Any) -> bool:
    """Whether it has named columns; otherwise it is one column."""
    return hasattr(data, "columns") and not callable(data.columns)
