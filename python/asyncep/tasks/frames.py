"""Data frames in and out: pandas, polars and Arrow, told apart without importing those that are not in use.

Results are put to rows by their place, never by an index or a name: an index may repeat itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from asyncep.client.errors import OptionError
from asyncep.tasks.results import Classification

_LIBRARIES = ("pandas", "polars", "pyarrow")


def library_of(data: object) -> str | None:
    """``pandas``, ``polars`` or ``pyarrow`` if `data` is one of their frames or columns; None otherwise."""
    library = type(data).__module__.split(".")[0]
    return library if library in _LIBRARIES else None


def texts_of(data: Any, column: str) -> list[Any]:
    """The texts of a frame's column, or of a column by itself (a Series, an Array).

    Raises:
        OptionError: the frame has no such column, or several; or it is neither a frame nor a column.
    """
    if is_frame(data):
        names = _names(data)
        if column not in names:
            raise OptionError(f"text={column!r}: the frame has no such column, only {', '.join(map(str, names))}")
        if names.count(column) > 1:
            raise OptionError(f"text={column!r}: {names.count(column)} columns are called that; rename all but one")
        if type(data).__name__ == "LazyFrame":
            raise OptionError("texts: the frame is lazy; collect() it first")
        data = data[column]
    # The arrays within pandas' columns spell it otherwise.
    spellings = ("to_pylist",) if library_of(data) == "pyarrow" else ("to_list", "tolist")
    convert = next((getattr(data, name) for name in spellings if hasattr(data, name)), None)
    if convert is None:
        raise OptionError(f"texts: a frame, a column or a list of strings is needed, not {type(data).__name__}")
    return list(convert())


def check_frame(data: Any, labels: Sequence[str]) -> None:
    """Refuses, before anything is computed, a frame that has a column of the results' names.

    Raises:
        OptionError: names the columns.
    """
    names = {_short(name) for name in _names(data)} if is_frame(data) else set()
    if taken := sorted(names & set(_result_names(labels))):
        raise OptionError(f"the frame already has the column(s) {', '.join(taken)}; rename or drop them")


def with_results(data: Any, results: Sequence[Classification], labels: Sequence[str]) -> Any:
    """The frame with the columns ``label``, ``probability``, ``p_LABEL`` for each label and ``error`` added.

    A column by itself becomes a frame of these columns alone. The index of pandas stays.

    Raises:
        OptionError: the frame has one of these columns already.
    """
    check_frame(data, labels)
    columns: dict[str, list[Any]] = {
        "label": [result.label for result in results],
        "probability": [result.probability for result in results],
        **{f"p_{label}": [result.probabilities.get(label) for result in results] for label in labels},
        "error": [result.error for result in results],
    }
    library = library_of(data)
    if library == "pandas":
        return _with_pandas(data, columns)
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
    table = data if isinstance(data, pyarrow.Table) else pyarrow.Table.from_batches([data])
    for name, values in arrays.items():
        table = table.append_column(name, values)
    return table


def is_frame(data: Any) -> bool:
    """Whether it has named columns; otherwise it is one column."""
    return hasattr(data, "columns") and not callable(data.columns)


def listed(argument: str, values: Any) -> list[Any]:
    """An argument's values as a list, in their order: a sequence, an array, or a column of a frame.

    Raises:
        OptionError: it is a single string, a frame, or has no order of its own; names the argument.
    """
    if library_of(values):
        if is_frame(values):
            raise OptionError(f"{argument}: a frame was given; give one of its columns, such as frame['text']")
        return texts_of(values, "")
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise OptionError(f"{argument}: a list is needed, not {type(values).__name__}")
    return list(values)


def _with_pandas(data: Any, columns: Mapping[str, list[Any]]) -> Any:
    import pandas  # type: ignore[import-untyped] # no stubs in the environment

    index = getattr(data, "index", None)
    added = pandas.DataFrame(columns, index=index if isinstance(index, pandas.Index) else None)
    if not is_frame(data):
        return added
    if data.columns.nlevels > 1:
        added.columns = pandas.MultiIndex.from_tuples([(name, *[""] * (data.columns.nlevels - 1)) for name in columns])
    # Rows are joined by their place: the index may repeat itself, and pandas would join each with each.
    joined = pandas.concat([data.reset_index(drop=True), added.reset_index(drop=True)], axis=1)
    joined.index = data.index
    return joined


def _names(data: Any) -> list[Any]:
    return list(data.column_names if library_of(data) == "pyarrow" else data.columns)


def _short(name: Any) -> str:
    """A name of several levels by its first where the others are empty."""
    return str(name[0]) if isinstance(name, tuple) and not any(name[1:]) else str(name)


def _result_names(labels: Sequence[str]) -> list[str]:
    return ["label", "probability", *(f"p_{label}" for label in labels), "error"]
