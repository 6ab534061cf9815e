"""``asyncep classify``: labels the rows of a file."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from asyncep.client.address import server_url
from asyncep.client.errors import OptionError, RejectedError, ServerError
from asyncep.cluster.ray_nodes import open_ray_session
from asyncep.jobs.journal import JobError
from asyncep.jobs.outputs import output_format
from asyncep.jobs.peak import measure_peak
from asyncep.jobs.progress import ProgressBar
from asyncep.jobs.report import figures_of, text_report
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobResult, JobSpec
from asyncep.local_server import StartError, local_server
from asyncep.tasks.rows import InputError, RowSource
from asyncep.tasks.session import Session, open_session
from asyncep.tasks.task import TaskOptions
from asyncep.tasks.template import DEFAULT, Template, TemplateError, read_examples, read_text
from asyncep_router.errors import ConfigError
from asyncep_router.keys import key_from

_EPILOG = """\
examples:
  asyncep classify in.jsonl out.jsonl --labels sport,politics --model-path ./demo-model --dp-size 2
  asyncep classify in.csv out.parquet --labels spam,ham --text-field body --url http://host:30000 \\
      --template 'Is this mail spam or ham?\\n\\nMail: {text}\\nAnswer:'

Each row of a JSONL OUT has row, label, probabilities and log_probabilities, or row and error if it could not be
classified. CSV and Parquet have columns for each label. With --gold-field the accuracy and a confusion table
are printed.

The job can be stopped at any point, kill -9 included: until it is done, OUT.job holds what has been computed,
and the same command goes on from there. OUT appears when it is whole, with each row once. An existing OUT or
report needs --overwrite. The job never writes over what it reads.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        0 when every row was tried, 1 when the server failed on the way or no row at all could be labelled, 2 for a
        command line or files that cannot be used.
    """
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        spec = _spec(options)
        # Fails on a missing file or column, or an output in the way, before a server is started for it.
        output_format(spec.output, spec.options.labels, gold=spec.source.gold_field is not None, keep=spec.source.keep)
        spec.check_files()
        for source in (spec.source, spec.calibration):
            if source is not None:
                source.check()
        peak = options.peak_tflops * 1e12 if options.peak_tflops else None
        with contextlib.ExitStack() as stack:
            url = options.url
            if not url and not options.ray_address:
                peak = peak or measure_peak()
                console.print(f"starting {options.dp_size} rank(s) of {options.model_path} …")
                url = stack.enter_context(
                    local_server(
                        options.model_path,
                        ["--dp-size", str(options.dp_size), "--log-level", "warning"],
                        on_wait=lambda seconds, line: console.print(
                            f"still starting after {seconds:.0f} s: {line}", markup=False, highlight=False
                        ),
                    )
                )
            if options.ray_address:
                console.print(f"starting {options.dp_size} rank(s) of {options.model_path} on each host …")
                flags = ["--dp-size", str(options.dp_size), "--log-level", "warning"]
                opening = open_ray_session(
                    options.ray_address, options.model_path, nodes=options.ray_nodes, arguments=flags
                )
            else:
                opening = open_session(url, api_key=key_from(options.api_key, "ASYNCEP_API_KEY"))
            result = asyncio.run(_run(replace(spec, peak=peak), opening, console))
    except (InputError, TemplateError, JobError, OptionError, ConfigError, FileNotFoundError) as error:
        print(f"asyncep classify: {error}", file=sys.stderr)
        return 2
    except (ServerError, StartError, RejectedError) as error:
        print(f"asyncep classify: {error}", file=sys.stderr)
        return 1
    except (OSError, sqlite3.OperationalError) as error:
        print(f"asyncep classify: {error}; what is done is kept, the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("stopped; what is done is kept, the same command goes on")
        return 130
    if result.summary.accuracy is not None:
        Console().print(result.summary.table())
    for line in text_report(result, peak):
        print(line)
    print(f"{result.summary.rows} rows, {result.summary.errors} with errors, written to {options.output}")
    if spec.report:
        print(f"report: {spec.report}")
    print(json.dumps(figures_of(result, peak)))
    if result.summary.rows and result.summary.errors == result.summary.rows:
        print("asyncep classify: no row could be labelled; OUT has the reason of each", file=sys.stderr)
        return 1
    return 0


async def _run(spec: JobSpec, opening: contextlib.AbstractAsyncContextManager[Session], console: Console) -> JobResult:
    async with opening as session:
        with ProgressBar(console, spec.source.count, spec.peak) as bar:
            return await run_job(spec, session, on_progress=bar.tell)


def _spec(options: argparse.Namespace) -> JobSpec:
    labels = [label.strip() for label in options.labels.split(",") if label.strip()]
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise InputError(f"--labels {options.labels}: at least two different labels are needed")
    if bool(options.url) == bool(options.model_path):
        raise InputError("give either --url of a running server or --model-path to start one")
    if options.url:
        options.url = server_url(options.url, "--url")
    if options.ray_address and options.url:
        raise InputError("--ray-address starts servers of its own: give --model-path in place of --url")
    if options.ray_nodes is not None and not options.ray_address:
        raise InputError("--ray-nodes: only with --ray-address")
    if options.limit is not None and options.limit < 0:
        raise InputError(f"--limit {options.limit}: a number of rows is needed")
    if options.batch_rows is not None:
        print("asyncep classify: --batch-rows does nothing any more; batches are planned", file=sys.stderr)
    examples: list[tuple[str, str]] = []
    if options.examples:
        examples = read_examples(
            options.examples, text_field=options.text_field, gold_field=options.gold_field or "label"
        )
    template = _template_text(options.template)
    try:
        Template.parse(template, labels, examples)
    except TemplateError as error:
        raise TemplateError(f"--{error}") from None
    source = RowSource(
        options.input,
        text_field=options.text_field,
        gold_field=options.gold_field,
        keep=tuple(name.strip() for name in (options.keep or "").split(",") if name.strip()),
        limit=options.limit,
        shard=options.shard,
    )
    calibration = RowSource(options.calibration, text_field=options.text_field) if options.calibration else None
    if calibration and options.calibrate:
        raise InputError("give either --calibration FILE or --calibrate TEXT")
    task = TaskOptions(
        tuple(labels),
        template,
        tuple(examples),
        tuple(options.calibrate or ()),
        chat=options.chat,
        system=options.system,
        length=options.label_length,
    )
    task.check()
    reads = [("--examples", options.examples)] if options.examples else []
    if options.template.startswith("@"):
        reads.append(("--template", Path(options.template[1:])))
    if options.model_path:
        reads.append(("--model-path", Path(options.model_path)))
    return JobSpec(
        source,
        options.output,
        task,
        calibration,
        part_rows=options.part_rows,
        restart=options.restart,
        report=None if options.no_report else options.report or options.output.with_name(options.output.name + ".html"),
        overwrite=options.overwrite,
        reads=tuple(reads),
    )


def _template_text(given: str) -> str:
    if given.startswith("@"):
        return read_text(Path(given[1:]))
    # A shell makes it hard to give a line break; the two characters \n are taken for one.
    return given.replace("\\n", "\n")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        found = int(index) - 1, int(count)
    except ValueError:
        found = (-1, 0)
    if not 0 <= found[0] < found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: write it as i/n, from 1/n to n/n")
    return found


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of at least 1 is needed")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "asyncep classify",
        description="Label each row of a file by the log-probability a model gives to each label.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("input", type=Path, metavar="IN", help=".jsonl, .ndjson, .csv or .parquet file")
    parser.add_argument("output", type=Path, metavar="OUT", help=".jsonl, .csv or .parquet file to write")
    what = parser.add_argument_group("rows")
    what.add_argument("--text-field", default="text", metavar="NAME", help="field with the text (default: text)")
    what.add_argument("--gold-field", metavar="NAME", help="field with the true label, for accuracy and confusion")
    what.add_argument("--keep", metavar="A,B,…", help="further fields to carry over to the output, such as an id")
    what.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    what.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="i/n",
        help="only part i of n, from 1/n to n/n; give each part an OUT of its own (row numbers stay those of the file)",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--labels", required=True, metavar="A,B,…", help="the labels to choose from")
    prompt.add_argument(
        "--template",
        default=DEFAULT,
        metavar="TEXT|@FILE",
        help="the prompt, with {text} once and {labels} if wanted; what stands before {text} is shared by all rows",
    )
    prompt.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help="JSONL with --text-field and --gold-field (default label): shown in every prompt",
    )
    prompt.add_argument("--chat", action="store_true", help="write the prompt in the model's chat format")
    prompt.add_argument("--system", metavar="TEXT", help="a system message, with --chat")
    prompt.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="file of texts (--text-field, no labels needed) whose mean score is subtracted from each label's",
    )
    prompt.add_argument(
        "--calibrate",
        action="append",
        metavar="TEXT",
        help="a neutral text such as N/A, in place of --calibration; may be repeated",
    )
    prompt.add_argument(
        "--label-length",
        choices=("sum", "mean"),
        default="sum",
        help="score of a label of several tokens: sum (default) or mean of its tokens' log-probabilities",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--url", help="a running server, such as http://127.0.0.1:30000; give this or --model-path")
    where.add_argument(
        "--api-key", metavar="KEY|@FILE", help="its API key, or a file with it (default: $ASYNCEP_API_KEY)"
    )
    where.add_argument(
        "--model-path",
        metavar="PATH",
        help="start a server for this model, for the length of the job; give this or --url",
    )
    where.add_argument("--dp-size", type=int, default=1, metavar="N", help="ranks of the started server (default 1)")
    where.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="start one server on each host of this Ray cluster (auto: the cluster of this host)",
    )
    where.add_argument(
        "--ray-nodes", type=_at_least_one, metavar="N", help="hosts of the cluster to use (default: all with CPUs)"
    )
    job = parser.add_argument_group("job")
    job.add_argument("--restart", action="store_true", help="forget what an unfinished run of this job has done")
    job.add_argument(
        "--overwrite",
        action="store_true",
        help="write over an OUT and a report that are there (never over what is read)",
    )
    job.add_argument(
        "--part-rows",
        type=_at_least_one,
        default=4096,
        metavar="N",
        help="rows planned and written together; a larger N shares more prefixes and takes more memory (default 4096)",
    )
    job.add_argument("--report", type=Path, metavar="FILE", help="where to write the HTML report (default OUT.html)")
    job.add_argument("--no-report", action="store_true", help="write no HTML report")
    job.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="TFLOP/s the server can do at best, to show MFU (measured where the server is started here)",
    )
    job.add_argument("--batch-rows", type=int, help=argparse.SUPPRESS)
    return parser
