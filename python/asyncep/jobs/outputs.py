"""Rows of the output as JSONL, CSV or Parquet: parts as bytes, and parts joined to one file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from asyncep.tasks.records import plain
from asyncep.tasks.results import Classification
from asyncep.tasks.rows import KINDS, InputError, Row

_CHUNK = 1 << 20
_DIGITS = 6
_JSONL_FIELDS = frozenset(("row", "label", "probabilities", "log_probabilities", "error"))


class OutputFormat(Protocol):
    """One kind of file."""

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        """The rows of one part."""
        ...

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        """Writes the parts, in their order, as one file."""
        ...


def output_format(path: Path, labels: Sequence[str], *, gold: bool, keep: Sequence[str]) -> OutputFormat:
    """The format that a path's ending names.

    Raises:
        InputError: none that is known.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{path}: give a .jsonl, .csv or .parquet file to write")
    if kind in (".jsonl", ".ndjson"):
        if own := sorted({*_JSONL_FIELDS, *(["gold"] if gold else [])} & set(keep)):
            raise InputError(f"--keep: the output has a field {', '.join(own)} of its own; rename yours")
        return _Jsonl()
    columns = ["row", *keep, *(["gold"] if gold else []), "label", "probability"]
    columns += [f"p_{label}" for label in labels] + [f"logp_{label}" for label in labels] + ["error"]
    if len(set(columns)) != len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise InputError(f"--keep: the output has a column {', '.join(twice)} of its own; rename yours")
    return _Csv(columns) if kind == ".csv" else _Parquet(columns, labels, keep)


def join_parts(unfinished: Path, parts: Iterable[Path], form: OutputFormat) -> None:
    """Makes one file of the parts, durable, under a name that is not the output's yet."""
    # Taken away first: after a kill its inode may be the output's already.
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as out:
        form.join(parts, out)
        out.flush()
        os.fsync(out.fileno())


def _as_text(value: Any) -> str | None:
    """A kept value for a column of text: strings as they are, dates and decimals as they print, the rest as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | list | dict):
        return orjson.dumps(value, default=plain).decode()
    return str(value)


def _record(row: Row, answer: Classification) -> dict[str, Any]:
    record: dict[str, Any] = {"row": row.number, **row.kept}
    if row.gold is not None:
        record["gold"] = row.gold
    return record


def _flat(row: Row, answer: Classification) -> dict[str, Any]:
    record = _record(row, answer)
    if answer.label is None:
        record["error"] = answer.error
        return record
    record["label"] = answer.label
    record["probability"] = round(answer.probabilities[answer.label], _DIGITS)
    for label, value in answer.probabilities.items():
        record[f"p_{label}"] = round(value, _DIGITS)
    for label, value in answer.log_probabilities.items():
        record[f"logp_{label}"] = round(value, _DIGITS)
    return record


def _append(parts: Iterable[Path], out: IO[bytes]) -> None:
    for part in parts:
        with part.open("rb") as file:
            while chunk := file.read(_CHUNK):
                out.write(chunk)


class _Jsonl:
    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        lines = []
        for row, answer in zip(rows, answers, strict=True):
            record = _record(row, answer)
            if answer.label is None:
                record["error"] = answer.error
            else:
                record["label"] = answer.label
                record["probabilities"] = {k: round(v, _DIGITS) for k, v in answer.probabilities.items()}
                record["log_probabilities"] = {k: round(v, _DIGITS) for k, v in answer.log_probabilities.items()}
            lines.append(orjson.dumps(record, default=plain))
        return b"\n".join(lines) + b"\n" if lines else b""

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        _append(parts, out)


class _Csv:
    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        lines = []
        for row, answer in zip(rows, answers, strict=True):
            record = _flat(row, answer)
            for name in row.kept:
                record[name] = _as_text(record[name])
            lines.append(self._line([record.get(name) for name in self._columns]))
        return "".join(lines).encode("utf-8", "replace")

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        out.write(self._line(self._columns).encode("utf-8", "replace"))
        _append(parts, out)

    def _line(self, values: Sequence[Any]) -> str:
        text = io.StringIO(newline="")
        # The writer quotes a field for the characters of its line ending only, and a reader takes either for an end.
        csv.writer(text, lineterminator="\r\n").writerow(values)
        return text.getvalue()[:-2] + "\n"


class _Parquet:
    """A part is Arrow's stream format; joined, each becomes a row group."""

    def __init__(self, columns: Sequence[str], labels: Sequence[str], keep: Sequence[str]) -> None:
        import pyarrow

        floats = {"probability", *(f"p_{label}" for label in labels), *(f"logp_{label}" for label in labels)}
        # Kept fields become text: their type may differ from row to row, and columns have one.
        self._texts = {*keep}
        self._schema = pyarrow.schema(
            [
                (name, pyarrow.int64() if name == "row" else pyarrow.float64() if name in floats else pyarrow.string())
                for name in columns
            ]
        )

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        import pyarrow

        records = [_flat(row, answer) for row, answer in zip(rows, answers, strict=True)]
        for record in records if self._texts else ():
            for name in self._texts:
                record[name] = _as_text(record.get(name))
        batch = pyarrow.RecordBatch.from_pylist(records, schema=self._schema)
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self._schema) as stream:
            stream.write_batch(batch)
        return bytes(sink.getvalue())

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        import pyarrow
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(out, self._schema, compression="zstd") as writer:
            for part in parts:
                with part.open("rb") as file, pyarrow.ipc.open_stream(file) as stream:
                    for batch in stream:
                        writer.write_batch(batch)
