"""Rows of the output in any kind of file: parts as bytes, and parts joined to one file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from asyncep.files.json_records import plain
from asyncep.files.kinds import FileFormat, InputError
from asyncep.files.opening import compressed
from asyncep.files.rows import Row
from asyncep.jobs.kept_columns import KeptValues, as_json, as_text, typed
from asyncep.tasks.result_columns import ColumnKind, column_values, result_columns
from asyncep.tasks.results import Classification
from asyncep.tasks.task import TaskOptions

_CHUNK = 1 << 20
_DIGITS = 6
_NOTHING = Classification(None)


class OutputFormat(Protocol):
    """One kind of file."""

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        """The rows of one part."""
        ...

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        """Writes the parts, in their order, as one file."""
        ...


def output_format(
    form: FileFormat,
    options: TaskOptions,
    *,
    gold: bool,
    keep: Sequence[str],
    types: Mapping[str, Any] | None = None,
    argument: str = "--keep",
) -> OutputFormat:
    """How rows are written in a format.

    Args:
        options: what is asked; the labels of the columns.
        gold: whether there are true labels.
        keep: the kept fields.
        types: Arrow's types of those of them that have one.
        argument: what the caller calls the kept fields.

    Raises:
        InputError: a kept field has the name of one of the output's own.
    """
    if len(set(keep)) < len(keep):
        raise InputError(f"{argument}: {next(name for name in keep if keep.count(name) > 1)!r} is named twice")
    if form.kind in ("jsonl", "json"):
        fields = {"row", *_answered(_NOTHING, options), "error", *(["gold"] if gold else [])}
        if own := sorted(fields & set(keep)):
            raise InputError(f"{argument}: the output has a field {', '.join(own)} of its own; rename yours")
        return _JsonLines(options) if form.kind == "jsonl" else _JsonArray(options)
    kinds = _columns(options)
    columns = ["row", *keep, *(["gold"] if gold else []), *kinds]
    if len(set(columns)) != len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise InputError(f"{argument}: the output has a column {', '.join(twice)} of its own; rename yours")
    if form.kind in ("csv", "tsv"):
        return _Csv(columns, options, "," if form.kind == "csv" else "\t")
    return _Columnar(columns, options, keep, types or {}, argument, parquet=form.kind == "parquet")


def join_parts(unfinished: Path, parts: Sequence[Path], form: OutputFormat, compression: FileFormat) -> None:
    """Makes one file of the parts, durable, under a name that is not the output's yet."""
    # Taken away first: after a kill its inode may be the output's already.
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as out:
        with compressed(out, compression.compression) as stream:
            form.join(parts, stream)
        out.flush()
        os.fsync(out.fileno())


def _record(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"row": row.number, **row.kept}
    if row.gold is not None:
        record["gold"] = row.gold
    return record


def _answered(answer: Classification, options: TaskOptions) -> dict[str, Any]:
    """The fields of a row's answer in JSON."""
    fields: dict[str, Any] = {"labels": list(answer.labels)} if options.multi_label else {"label": answer.label}
    fields["probabilities"] = {k: round(v, _DIGITS) for k, v in answer.probabilities.items()}
    fields["log_probabilities"] = {k: round(v, _DIGITS) for k, v in answer.log_probabilities.items()}
    if options.truncate is not None:
        fields["cut_characters"] = answer.cut_characters
    return fields


def _columns(options: TaskOptions) -> dict[str, ColumnKind]:
    """The columns of a row's answer in a table, with their kinds."""
    columns = result_columns(options)
    error = columns.pop("error")
    return {**columns, **{f"logp_{label}": "number" for label in options.labels}, "error": error}


def _flat(row: Row, answer: Classification, options: TaskOptions) -> dict[str, Any]:
    record = _record(row)
    if answer.label is None:
        record["error"] = answer.error
        return record
    values = {name: values[0] for name, values in column_values([answer], options).items()}
    record.update({name: round(v, _DIGITS) if isinstance(v, float) else v for name, v in values.items()})
    for label, value in answer.log_probabilities.items():
        record[f"logp_{label}"] = round(value, _DIGITS)
    return record


def _chunks(part: Path) -> Iterator[bytes]:
    with part.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


class _JsonLines:
    def __init__(self, options: TaskOptions) -> None:
        self._options = options

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        lines = []
        for row, answer in zip(rows, answers, strict=True):
            record = _record(row)
            if answer.label is None:
                record["error"] = answer.error
            else:
                record.update(_answered(answer, self._options))
            lines.append(orjson.dumps(record, default=plain))
        return b"\n".join(lines) + b"\n" if lines else b""

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        for part in parts:
            for chunk in _chunks(part):
                out.write(chunk)


class _JsonArray(_JsonLines):
    """The lines of JSONL with commas between them: JSON has no line break within a value."""

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        out.write(b"[")
        before = b"\n"
        for part in parts:
            with part.open("rb") as lines:
                for line in lines:
                    out.write(before + line.rstrip(b"\n"))
                    before = b",\n"
        out.write(b"\n]\n")


class _Csv:
    def __init__(self, columns: Sequence[str], options: TaskOptions, delimiter: str) -> None:
        self._columns, self._options = list(columns), options
        self._delimiter = delimiter

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        lines = []
        for row, answer in zip(rows, answers, strict=True):
            record = _flat(row, answer, self._options)
            lines.append(self._line([as_text(record.get(name)) for name in self._columns]))
        return "".join(lines).encode("utf-8", "replace")

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        out.write(self._line(self._columns).encode("utf-8", "replace"))
        for part in parts:
            for chunk in _chunks(part):
                out.write(chunk)

    def _line(self, values: Sequence[Any]) -> str:
        text = io.StringIO(newline="")
        # The writer quotes a field for the characters of its line ending only, and a reader takes either for an end.
        csv.writer(text, delimiter=self._delimiter, lineterminator="\r\n").writerow(values)
        return text.getvalue()[:-2] + "\n"


class _Columnar:
    """A part is Arrow's stream format; joined, each becomes a row group, or a batch of an IPC file.

    Kept fields whose type is not known beforehand stand in the parts as JSON.
    """

    def __init__(
        self,
        columns: Sequence[str],
        options: TaskOptions,
        keep: Sequence[str],
        types: Mapping[str, Any],
        argument: str,
        *,
        parquet: bool,
    ) -> None:
        import pyarrow

        self._options, self._parquet = options, parquet
        of_kinds: dict[ColumnKind, Any] = {
            "text": pyarrow.string(),
            "texts": pyarrow.list_(pyarrow.string()),
            "number": pyarrow.float64(),
            "count": pyarrow.int64(),
        }
        self._untyped = [name for name in keep if name not in types]
        types = {name: _as_values(types[name]) for name in keep if name in types}
        known = {"row": pyarrow.int64(), **{name: of_kinds[kind] for name, kind in _columns(options).items()}}
        known.update({name: types[name] for name in keep if name in types})
        self._schema = pyarrow.schema([(name, known.get(name, pyarrow.string())) for name in columns])
        for name in types:
            self._check_column(name, argument)

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        import pyarrow

        records = [_flat(row, answer, self._options) for row, answer in zip(rows, answers, strict=True)]
        for record in records if self._untyped else ():
            for name in self._untyped:
                record[name] = as_json(record.get(name))
        batch = pyarrow.RecordBatch.from_pylist(records, schema=self._schema)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self._schema) as stream:
            stream.write_batch(batch)
        return bytes(sink.getvalue())

    def join(self, parts: Sequence[Path], out: IO[bytes]) -> None:
        import pyarrow
        import pyarrow.parquet

        kinds = {name: KeptValues() for name in self._untyped}
        for batch in _batches(parts) if kinds else ():
            for name, kind in kinds.items():
                kind.add(batch.column(name).to_pylist())
        schema = self._schema
        for name, kind in kinds.items():
            schema = schema.set(schema.get_field_index(name), pyarrow.field(name, kind.arrow_type()))
        with self._writer(out, schema) as writer:
            for batch in _batches(parts):
                arrays = [
                    typed(batch.column(field.name).to_pylist(), field.type)
                    if field.name in kinds
                    else batch.column(field.name)
                    for field in schema
                ]
                writer.write_batch(pyarrow.RecordBatch.from_arrays(arrays, schema=schema))

    def _writer(self, out: Any, schema: Any) -> Any:
        import pyarrow.parquet

        if self._parquet:
            return pyarrow.parquet.ParquetWriter(out, schema, compression="zstd")
        return pyarrow.ipc.new_file(out, schema)

    def _check_column(self, name: str, argument: str) -> None:
        """Refuses a kept column of a type that cannot be written, before anything is computed."""
        import pyarrow

        field = self._schema.field(name)
        try:
            array = pyarrow.array([None], field.type)
            with self._writer(pyarrow.BufferOutputStream(), pyarrow.schema([field])) as writer:
                writer.write_batch(pyarrow.RecordBatch.from_arrays([array], names=[name]))
        except (pyarrow.ArrowException, TypeError, ValueError) as error:
            raise InputError(f"{argument} {name}: a column of type {field.type} cannot be written: {error}") from error


def _as_values(kind: Any) -> Any:
    """A type without dictionaries: each part would have another one."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return _as_values(kind.value_type)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        make = pyarrow.list_ if pyarrow.types.is_list(kind) else pyarrow.large_list
        return make(_as_values(kind.value_type))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([(field.name, _as_values(field.type)) for field in kind])
    return kind


def _batches(parts: Iterable[Path]) -> Iterator[Any]:
    import pyarrow

    for part in parts:
        with part.open("rb") as file, pyarrow.ipc.open_stream(file) as stream:
            yield from stream
