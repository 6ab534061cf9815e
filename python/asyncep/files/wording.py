"""What a caller calls the things that errors speak of: flags in a shell, arguments in Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Names of the arguments of a job; each error names one of them."""

    source: str
    output: str
    text: str
    gold: str
    keep: str
    input_format: str
    output_format: str
    delimiter: str
    quote: str
    encoding: str
    header: str
    overwrite: str
    restart: str
    report: str
    calibration: str
    limit: str
    shard: str


SHELL = Wording(
    source="IN",
    output="OUT",
    text="--text-field",
    gold="--gold-field",
    keep="--keep",
    input_format="--input-format",
    output_format="--output-format",
    delimiter="--delimiter",
    quote="--quote",
    encoding="--encoding",
    header="--no-header",
    overwrite="--overwrite",
    restart="--restart",
    report="--report",
    calibration="--calibration",
    limit="--limit",
    shard="--shard",
)
PYTHON = Wording(
    source="source",
    output="output",
    text="text",
    gold="gold",
    keep="keep",
    input_format="input_format",
    output_format="output_format",
    delimiter="delimiter",
    quote="quote",
    encoding="encoding",
    header="header=False",
    overwrite="overwrite=True",
    restart="restart=True",
    report="report",
    calibration="calibrate",
    limit="limit",
    shard="shard",
)
