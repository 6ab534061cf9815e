"""Rows of the output as JSONL, CSV or Parquet: parts as bytes, and parts joined to one file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import orjson

from asyncep.classify.rows import KINDS, InputError, Row
from asyncep.runtime.results import Classification

_CHUNK = 1 << 20
_DIGITS = 6


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
        return _Jsonl()
    columns = ["row", *keep, *(["gold"] if gold else []), "label", "probability"]
    columns += [f"p_{label}" for label in labels] + [f"logp_{label}" for label in labels] + ["error"]
    if len(set(columns)) != len(columns):
        twice = sorted({name for name in columns if columns.count(name) > 1})
        raise InputError(f"--keep: the output has a column {', '.join(twice)} of its own; rename yours, or write JSONL")
    return _Csv(columns) if kind == ".csv" else _Parquet(columns, labels, keep)


def join_parts(output: Path, parts: Iterable[Path], form: OutputFormat) -> None:
    """Makes the output of its parts: whole, or not there."""
    unfinished = output.with_name(output.name + ".tmp")
    with unfinished.open("wb") as out:
        form.join(parts, out)
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(output)
    folder = os.open(output.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
            lines.append(orjson.dumps(record, default=str))
        return b"\n".join(lines) + b"\n" if lines else b""

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        _append(parts, out)


class _Csv:
    def __init__(self, columns: Sequence[str]) -> None:
        self._columns = list(columns)

    def part(self, rows: Sequence[Row], answers: Sequence[Classification]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writerows(_flat(row, answer) for row, answer in zip(rows, answers, strict=True))
        return text.getvalue().encode("utf-8", "replace")

    def join(self, parts: Iterable[Path], out: IO[bytes]) -> None:
        head = io.StringIO(newline="")
        csv.DictWriter(head, self._columns, lineterminator="\n").writeheader()
        out.write(head.getvalue().encode())
        _append(parts, out)


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
                value = record.get(name)
                record[name] = (
                    value if value is None or isinstance(value, str) else orjson.dumps(value, default=str).decode()
                )
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
