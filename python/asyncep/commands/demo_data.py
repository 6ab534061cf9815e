"""``asyncep demo-data``: real text with labels, as a file for a job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from asyncep.demo.spam import corpus_path
from asyncep.demo.weights import DemoDataMissing
from asyncep.own_files import OutputError, new_file


def bbc() -> Iterator[dict[str, Any]]:
    """BBC news, 2,225 articles in five sections."""
    from asyncep.demo.news import all_articles

    for article in all_articles():
        yield {"name": article.name, "text": article.text, "label": article.topic}


def spam_assassin() -> Iterator[dict[str, Any]]:
    """The SpamAssassin corpus, 6,046 mails."""
    from asyncep.demo.spam import all_mails

    for mail in all_mails():
        yield {"name": mail.name, "text": mail.text, "label": mail.label}


DATASETS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"bbc": bbc, "spam-assassin": spam_assassin}


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0, or 2 when the data set has not been fetched or OUT cannot be written."""
    parser = argparse.ArgumentParser(
        "asyncep demo-data",
        description="Write a data set as JSONL with name, text and label, for `asyncep classify --gold-field label`.",
    )
    parser.add_argument("name", choices=sorted(DATASETS))
    parser.add_argument("output", type=Path, metavar="OUT", help=".jsonl file to write")
    parser.add_argument(
        "--characters", type=int, metavar="N", help="only the first N characters of each text (default: all)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over an OUT that is there")
    options = parser.parse_args(arguments)
    try:
        rows = write_dataset(options.name, options.output, options.characters, overwrite=options.overwrite)
    except (DemoDataMissing, OutputError) as error:
        print(f"asyncep demo-data: {error}", file=sys.stderr)
        return 2
    print(f"{rows} rows written to {options.output}")
    return 0


def write_dataset(name: str, output: Path, characters: int | None = None, *, overwrite: bool = False) -> int:
    """Writes a data set and returns its number of rows.

    Raises:
        DemoDataMissing: it is not on this machine; says how to get it.
        OutputError: the output is there already, or its folder is not.
    """
    rows = 0
    with new_file("OUT", output, overwrite=overwrite, reads=[("the data set", corpus_path())]) as file:
        for row in DATASETS[name]():
            file.write(orjson.dumps({**row, "text": row["text"][:characters]}) + b"\n")
            rows += 1
    return rows
