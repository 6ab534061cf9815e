"""Kinds of files, told by their names or given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from asyncep.files.wording import SHELL, Wording

Kind = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
Compression = Literal["gzip", "zstd"]

KINDS: tuple[Kind, ...] = get_args(Kind)
ENDINGS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_SHORT = {"gzip": ".gz", "zstd": ".zst"}


class InputError(ValueError):
    """The input cannot be read at all; the message names the option to change."""


@dataclass(frozen=True)
class FileFormat:
    """What is in a file.

    Attributes:
        kind: ``jsonl``, ``json`` (one array of objects), ``csv``, ``tsv``, ``parquet`` or ``arrow`` (IPC, file or
            stream).
        compression: what the whole file is compressed with; None for nothing.
    """

    kind: Kind
    compression: Compression | None = None

    @classmethod
    def of(cls, path: Path, *, to_write: bool = False) -> FileFormat:
        """The format that a path's endings name.

        Raises:
            InputError: none that is known.
        """
        endings = [ending.lower() for ending in path.suffixes[-2:]]
        compression = COMPRESSIONS.get(endings[-1]) if endings else None
        ending = endings[-2] if compression and len(endings) > 1 else endings[-1] if endings else ""
        if ending not in ENDINGS:
            raise InputError(
                f"{path}: give a .jsonl, .json, .csv, .tsv, .parquet or .arrow file{' to write' if to_write else ''}, "
                "each also with .gz or .zst; or name its format"
            )
        return cls(ENDINGS[ending], compression)

    @classmethod
    def named(cls, name: str, argument: str) -> FileFormat:
        """A format by its name, such as ``csv`` or ``jsonl.gz``.

        Raises:
            InputError: there is none of that name; names the argument.
        """
        kind, _, short = name.lower().lstrip(".").partition(".")
        compression = COMPRESSIONS.get(f".{short}")
        if f".{kind}" not in ENDINGS or (short and compression is None):
            raise InputError(f"{argument} {name!r}: give one of {', '.join(KINDS)}, with .gz or .zst if compressed")
        return cls(ENDINGS[f".{kind}"], compression)

    def __str__(self) -> str:
        return self.kind + (_SHORT[self.compression] if self.compression else "")


@dataclass(frozen=True)
class ReadOptions:
    """How a file of text is to be read; None where that is found out.

    Attributes:
        format: what is in it; by default what its name says.
        encoding: of its bytes, as Python names it; by default UTF-8, or what a byte-order mark says.
        delimiter: one character between the fields of a table; by default the one of ``,``, ``;``, tab and ``|`` with
            which the header has the wanted columns.
        quote: the character that fields with delimiters in them stand in; empty for none.
        header: the first row of a table has the columns' names. Without it they are called 1, 2, …
    """

    format: FileFormat | None = None
    encoding: str | None = None
    delimiter: str | None = None
    quote: str = '"'
    header: bool = True

    def check(self, found: FileFormat, words: Wording = SHELL) -> None:
        """Refuses what a file of this format has no use for.

        Raises:
            InputError: names the argument.
        """
        of_tables = (
            (words.delimiter, self.delimiter is not None),
            (words.quote, self.quote != '"'),
            (words.header, not self.header),
        )
        for argument, given in of_tables:
            if given and found.kind not in ("csv", "tsv"):
                raise InputError(f"{argument}: only for CSV and TSV; the input is {found.kind}")
        if self.encoding is not None and found.kind in ("parquet", "arrow"):
            raise InputError(f"{words.encoding}: only for files of text; the input is {found.kind}")
        if self.encoding is not None:
            _check_encoding(self.encoding, words)
        if self.delimiter is not None and len(self.delimiter) != 1:
            raise InputError(f"{words.delimiter} {self.delimiter!r}: one character is needed")
        if len(self.quote) > 1:
            raise InputError(f"{words.quote} {self.quote!r}: one character is needed, or none for no quotes")


def _check_encoding(name: str, words: Wording) -> None:
    try:
        "".encode(name)
    except LookupError:
        raise InputError(
            f"{words.encoding} {name!r}: no such encoding; utf-8, cp1252, latin-1 and utf-16 are some"
        ) from None
