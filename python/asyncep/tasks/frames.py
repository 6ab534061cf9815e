"""What Python callers have texts in: frames and columns of pandas, polars, Arrow and Hugging Face, and mappings.

Libraries are told apart without importing those that are not in use. Results are put to rows by their place, never by
an index or a name: an index may repeat itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from asyncep.client.errors import OptionError
from asyncep.tasks.result_columns import ColumnKind, column_values, result_columns
from asyncep.tasks.results import Classification
from asyncep.tasks.task import TaskOptions

_LIBRARIES = ("pandas", "polars", "pyarrow", "datasets")
Columns = Mapping[str, list[Any]]
Kinds = Mapping[str, ColumnKind]


@dataclass(frozen=True)
class Tabular:
    """A caller's table or column.

    Attributes:
        texts: to be classified, in the order of the rows.
        names: of the columns it has; empty for a column by itself.
        add: puts columns of these kinds beside them, and gives what the caller gets.
    """

    texts: list[Any]
    names: tuple[str, ...]
    add: Callable[[Columns, Kinds], Any]

    def check(self, options: TaskOptions) -> None:
        """Refuses, before anything is computed, a table that has a column of the results' names.

        Raises:
            OptionError: names the columns.
        """
        if taken := sorted(set(self.names) & set(result_columns(options))):
            raise OptionError(f"the frame already has the column(s) {', '.join(taken)}; rename or drop them")

    def with_results(self, results: Sequence[Classification], options: TaskOptions) -> Any:
        """The table with the columns of `result_columns` added; of a column by itself, a table of these alone."""
        return self.add(column_values(results, options), result_columns(options))


def tabular(data: Any, column: str) -> Tabular | None:
    """A frame, a column, or columns in a mapping; None for a list, an iterator, or what is none of these.

    Args:
        column: the one with the texts.

    Raises:
        OptionError: it has no such column, or several; or it is a table of a kind that cannot be taken, with what to
            give in its place.
    """
    library, kind = library_of(data), type(data).__name__
    if library == "datasets":
        return _dataset(data, column)
    if isinstance(data, Mapping):
        return _mapping(data, column)
    if library is None:
        if is_frame(data) and not isinstance(data, type):
            raise OptionError(
                f"texts: a {kind} of {type(data).__module__.split('.')[0]} is not taken; give one of its columns as a "
                "list, or a frame of pandas, polars or Arrow"
            )
        return None
    if kind == "LazyFrame":
        frame = data.collect()
        return Tabular(
            texts_of(frame, column), _shorts(frame), lambda found, kinds: _polars(frame, found, kinds).lazy()
        )
    if kind == "RecordBatchReader":
        table = data.read_all()
        return Tabular(texts_of(table, column), _shorts(table), lambda found, kinds: _arrow(table, found, kinds))
    texts = texts_of(data, column)
    put = {"pandas": _pandas, "polars": _polars, "pyarrow": _arrow}[library]
    return Tabular(texts, _shorts(data) if is_frame(data) else (), lambda found, kinds: put(data, found, kinds))


def library_of(data: object) -> str | None:
    """``pandas``, ``polars``, ``pyarrow`` or ``datasets`` if `data` is one of theirs; None otherwise."""
    library = type(data).__module__.split(".")[0]
    return library if library in _LIBRARIES else None


def texts_of(data: Any, column: str) -> list[Any]:
    """The texts of a frame's column, or of a column by itself (a Series, an Array).

    Raises:
        OptionError: the frame has no such column, or several; or it is neither a frame nor a column.
    """
    if is_frame(data):
        _check_column(_names(data), column, "the frame")
        data = data[column]
    # The arrays within pandas' columns spell it otherwise.
    spellings = ("to_pylist",) if library_of(data) == "pyarrow" else ("to_list", "tolist")
    convert = next((getattr(data, name) for name in spellings if hasattr(data, name)), None)
    if convert is None:
        raise OptionError(f"texts: a frame, a column or a list of strings is needed, not {type(data).__name__}")
    return list(convert())


def is_frame(data: Any) -> bool:
    """Whether it has named columns; otherwise it is one column."""
    return hasattr(data, "columns") and not callable(data.columns)


def listed(argument: str, values: Any) -> list[Any]:
    """An argument's values as a list, in their order: a sequence, an array, or a column of a frame.

    Raises:
        OptionError: it is a single string, a frame, or has no order of its own; names the argument.
    """
    library = library_of(values)
    if library == "datasets" and type(values).__name__ == "Column":
        return list(values)
    if library:
        if is_frame(values) or library == "datasets":
            raise OptionError(f"{argument}: a frame was given; give one of its columns, such as frame['text']")
        return texts_of(values, "")
    if is_frame(values) and not isinstance(values, type):
        raise OptionError(f"{argument}: a frame was given; give one of its columns, such as frame['text']")
    if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
        raise OptionError(f"{argument}: a list is needed, not {type(values).__name__}")
    if is_array(values):
        array: Any = values
        if array.ndim != 1 or array.dtype.names:
            raise OptionError(f"{argument}: an array of one dimension is needed, not of shape {array.shape}")
    return list(values)


def is_array(values: object) -> bool:
    """Whether it is an array of numpy's."""
    return type(values).__module__ == "numpy" and type(values).__name__ in ("ndarray", "memmap", "recarray")


def _mapping(data: Mapping[Any, Any], column: str) -> Tabular:
    names = list(data)
    if not names or not all(isinstance(name, str) for name in names):
        raise OptionError("texts: of a mapping, each key has to be a column's name, and each value the column")
    _check_column(names, column, "the mapping")
    columns = {name: listed(f"texts[{name!r}]", data[name]) for name in names}
    rows = len(columns[column])
    if odd := [name for name in names if len(columns[name]) != rows]:
        raise OptionError(
            f"texts: columns of different lengths: {column!r} has {rows}, {odd[0]!r} has {len(columns[odd[0]])}"
        )
    return Tabular(columns[column], tuple(names), lambda found, _: {**data, **found})


def _dataset(data: Any, column: str) -> Tabular:
    kind = type(data).__name__
    if kind == "Column":
        # A column by itself has no rows to put results beside; they come as a mapping.
        return Tabular(list(data), (), lambda found, _: dict(found))
    if kind != "Dataset":
        advice = "one of its splits" if "Dict" in kind else "an iterator, (row['text'] for row in dataset)"
        raise OptionError(f"texts: {kind} is not taken; give {advice}")
    _check_column(list(data.column_names), column, "the dataset")

    def add(found: Columns, kinds: Kinds) -> Any:
        import datasets  # type: ignore[import-untyped] # no stubs in the environment

        values = {
            "text": datasets.Value("string"),
            "number": datasets.Value("float64"),
            "count": datasets.Value("int64"),
        }
        listing = {"texts": datasets.Sequence(datasets.Value("string"))}
        features = datasets.Features({name: {**values, **listing}[kind] for name, kind in kinds.items()})
        added = datasets.Dataset.from_dict(dict(found), features=features)
        if not len(data):  # joining leaves empty ones out
            return datasets.Dataset.from_dict(
                {name: [] for name in (*data.features, *features)},
                features=datasets.Features({**data.features, **features}),
            )
        return datasets.concatenate_datasets([data, added], axis=1)

    return Tabular(list(data[column]), tuple(data.column_names), add)


def _check_column(names: Sequence[Any], column: str, what: str) -> None:
    if column not in names:
        raise OptionError(f"text={column!r}: {what} has no such column, only {', '.join(map(str, names))}")
    if names.count(column) > 1:
        raise OptionError(f"text={column!r}: {names.count(column)} columns are called that; rename all but one")


def _polars(data: Any, columns: Columns, kinds: Kinds) -> Any:
    import polars

    types: dict[ColumnKind, Any] = {
        "text": polars.String,
        "texts": polars.List(polars.String),
        "number": polars.Float64,
        "count": polars.Int64,
    }
    added = polars.DataFrame(columns, schema={name: types[kind] for name, kind in kinds.items()})
    return data.hstack(added) if is_frame(data) else added


def _arrow(data: Any, columns: Columns, kinds: Kinds) -> Any:
    import pyarrow

    types: dict[ColumnKind, Any] = {
        "text": pyarrow.string(),
        "texts": pyarrow.list_(pyarrow.string()),
        "number": pyarrow.float64(),
        "count": pyarrow.int64(),
    }
    arrays = {name: pyarrow.array(columns[name], types[kind]) for name, kind in kinds.items()}
    if not is_frame(data):
        return pyarrow.table(arrays)
    table = data if isinstance(data, pyarrow.Table) else pyarrow.Table.from_batches([data])
    for name, values in arrays.items():
        table = table.append_column(name, values)
    return table


def _pandas(data: Any, columns: Columns, kinds: Kinds) -> Any:
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


def _shorts(data: Any) -> tuple[str, ...]:
    return tuple(map(_short, _names(data)))


def _short(name: Any) -> str:
    """A name of several levels by its first where the others are empty."""
    return str(name[0]) if isinstance(name, tuple) and not any(name[1:]) else str(name)
