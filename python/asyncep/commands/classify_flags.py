"""The command line of ``asyncep classify``: its flags, and the job that they describe."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from asyncep.client.address import server_url
from asyncep.files.kinds import FileFormat, InputError, ReadOptions
from asyncep.files.opening import kept_stream
from asyncep.files.rows import RowSource
from asyncep.files.wording import SHELL
from asyncep.jobs.spec import JobSpec
from asyncep.own_files import Named
from asyncep.tasks.label_files import Labels, labels_in, read_labels
from asyncep.tasks.task import TaskOptions
from asyncep.tasks.template import read_examples, read_template

STREAM = Path("-")
_EPILOG = """\
examples:
  asyncep classify in.jsonl out.jsonl --labels sport,politics --model-path ./demo-model --dp-size 2
  asyncep classify in.csv.gz out.parquet --labels spam,ham --text-field body --url http://host:30000 \\
      --template 'Is this mail spam or ham?\\n\\nMail: {text}\\nAnswer:'
  zcat mails.jsonl.gz | asyncep classify - - --labels-file labels.yaml --url http://host:30000 > labelled.jsonl

Each row of a JSONL OUT has row, label, probabilities and log_probabilities, or row and error if it could not be
classified. Tables have columns for each label. With --gold-field the accuracy and a confusion table are printed.

The job can be stopped at any point, kill -9 included: until it is done, OUT.job holds what has been computed,
and the same command goes on from there. OUT appears when it is whole, with each row once. An existing OUT or
report needs --overwrite. The job never writes over what it reads.

exit status: 0 every row was tried, and no more had errors than --max-errors; 1 the server or the disk failed, or
too many rows had errors; 2 the command line or a file cannot be used; 130 or 143 stopped, the same command goes on
"""


@contextmanager
def job_of(options: argparse.Namespace, scratch: Path) -> Iterator[JobSpec]:
    """The job that the flags describe. What comes from a pipe is kept for its length.

    Args:
        scratch: a folder of this process' own, for what goes to standard output.

    Raises:
        InputError, OptionError, TemplateError: a flag that cannot be used, named.
    """
    _check_where(options)
    task = _task(options)
    to_stdout = options.output == STREAM
    output = scratch / "output" if to_stdout else options.output
    formats = {
        name: None if given is None else FileFormat.named(given, flag)
        for name, given, flag in (
            ("in", options.input_format, SHELL.input_format),
            ("out", options.output_format, SHELL.output_format),
        )
    }
    form = formats["out"] or (FileFormat("jsonl") if to_stdout else None)
    reading = ReadOptions(
        formats["in"],
        options.encoding,
        _escaped(options.delimiter),
        "" if options.quote == "none" else options.quote,
        not options.no_header,
    )
    source = RowSource(
        options.input,
        text_field=options.text_field,
        gold_field=options.gold_field,
        keep=tuple(name.strip() for name in (options.keep or "").split(",") if name.strip()),
        limit=options.limit,
        shard=options.shard,
        options=reading,
    )
    calibration = RowSource(options.calibration, text_field=options.text_field) if options.calibration else None
    report = None if options.no_report else options.report
    if report is None and not options.no_report and not to_stdout:
        report = output.with_name(output.name + ".html")
    spec = JobSpec(
        source,
        output,
        task,
        calibration,
        part_rows=options.part_rows,
        restart=options.restart,
        report=report,
        overwrite=options.overwrite,
        reads=tuple(_read_besides(options)),
        form=form,
    )
    # Whatever can be refused is, before a pipe is read to its end.
    spec.rows_as()
    streamed = options.input == STREAM
    if not streamed:
        spec.check_files()
    if options.model_path and not options.ray_address:
        _check_model(options.model_path)
    if not streamed:
        yield spec
        return
    if sys.stdin is None:
        raise InputError("IN -: standard input is closed")
    if sys.stdin.isatty():
        print("asyncep classify: reading rows from the terminal; end with Ctrl-D", file=sys.stderr)
    folder = scratch if to_stdout or not output.parent.is_dir() else output.parent
    with kept_stream(sys.stdin.buffer, folder) as (path, digest):
        known = replace(reading, format=reading.format or FileFormat("jsonl"))
        spec = replace(spec, source=replace(source, path=path, options=known, digest=digest))
        spec.check_files()
        yield spec


def most_errors(given: str, rows: int) -> int:
    """How many rows may have errors, of so many: a number, or a share with a per cent sign.

    Raises:
        InputError: it is neither.
    """
    number, percent, rest = given.strip().partition("%")
    try:
        found = float(number) / 100 * rows if percent else int(number)
    except ValueError:
        found = -1
    if rest or not found >= 0 or (percent and float(number) > 100):
        raise InputError(f"--max-errors {given!r}: a number of rows, or a share from 0% to 100%, is needed")
    return int(found)


def _check_where(options: argparse.Namespace) -> None:
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
    if options.other is not None and options.other_below is None:
        raise InputError("--other: only with --other-below")
    if options.report is not None and options.no_report:
        raise InputError("give either --report FILE or --no-report")
    if options.dp_size is not None and options.url:
        raise InputError("--dp-size: only with --model-path; the server at --url has its ranks")
    if options.peak_tflops is not None and not options.peak_tflops > 0:
        raise InputError(f"--peak-tflops {options.peak_tflops}: a number above 0 is needed")
    if options.batch_rows is not None:
        print("asyncep classify: --batch-rows does nothing any more; batches are planned", file=sys.stderr)
    most_errors(options.max_errors, 0)


def _check_model(given: str) -> None:
    """Refuses a folder that holds no model that can be served; of a hub name only the server knows."""
    folder = Path(given).expanduser()
    if not folder.is_dir():
        if given.startswith((".", "/", "~")) or given.count("/") > 1 or folder.is_file():
            raise InputError(f"--model-path {given}: no such folder; give a checkpoint's folder or a hub name")
        return
    from asyncep_sgl.config.model_support import check_supported, read_config
    from asyncep_sgl.errors import AsyncEPError

    try:
        # What the device at hand cannot compute is the server's to say: looking for it takes seconds.
        check_supported(read_config(str(folder)), device="any")
    except AsyncEPError as error:
        raise InputError(f"--model-path {given}: {error}" if "--model-path" not in str(error) else str(error)) from None


def _task(options: argparse.Namespace) -> TaskOptions:
    if options.calibration and options.calibrate:
        raise InputError("give either --calibration FILE or --calibrate TEXT")
    labels = _labels(options)
    examples: list[tuple[str, str]] = []
    if options.examples:
        examples = read_examples(
            options.examples, text_field=options.text_field, gold_field=options.gold_field or "label"
        )
    threshold = labels.thresholds or None
    if options.threshold is not None:
        # The flag is for labels that the file has none for.
        threshold = {label: labels.thresholds.get(label, options.threshold) for label in labels.names}
    task = TaskOptions(
        labels.names,
        _template_text(options.template),
        tuple(examples),
        tuple(options.calibrate or ()),
        chat=options.chat,
        system=options.system,
        length=options.label_length,
        descriptions=labels.descriptions,
        words=labels.words,
        multi_label=options.multi_label,
        threshold=threshold,
        other_below=options.other_below,
        other=options.other or "other",
        truncate=options.truncate,
    )
    task.check()
    return task


def _labels(options: argparse.Namespace) -> Labels:
    if bool(options.labels) == bool(options.labels_file):
        raise InputError("give either --labels A,B,… or --labels-file FILE")
    return read_labels(options.labels_file) if options.labels_file else labels_in(options.labels)


def in_flags(message: str, options: argparse.Namespace) -> str:
    """An error of a Python argument in the words of a shell."""
    labels = "--labels-file" if options.labels_file else "--labels"
    name, colon, rest = message.partition(":")
    if name not in {field.name for field in fields(TaskOptions)}:
        return message
    if name in ("labels", "descriptions", "words"):
        return f"{labels}: {'' if name == 'labels' else name + ':'}{rest.lstrip() if name == 'labels' else rest}"
    rest = rest.replace("chat=True", "--chat").replace("multi_label", "--multi-label")
    return f"--{name.replace('_', '-')}{colon}{rest.replace('other_below', '--other-below')}"


def _read_besides(options: argparse.Namespace) -> Iterator[Named]:
    for flag, path in (("--examples", options.examples), ("--labels-file", options.labels_file)):
        if path:
            yield flag, path
    if options.template and options.template.startswith("@"):
        yield "--template", Path(options.template[1:])
    if options.model_path:
        yield "--model-path", Path(options.model_path)
    if options.input == STREAM and sys.stdin is not None and stat.S_ISREG(os.fstat(sys.stdin.fileno()).st_mode):
        # Under its own name: what is read is a copy.
        yield SHELL.source, Path(f"/proc/self/fd/{sys.stdin.fileno()}")


def _template_text(given: str | None) -> str | None:
    if given is None:
        return None
    if given.startswith("@"):
        return read_template(Path(given[1:]))
    # A shell makes it hard to give a line break; the two characters \\n are taken for one.
    return given.replace("\\n", "\n")


def _escaped(delimiter: str | None) -> str | None:
    # A shell makes it hard to give a tab.
    return {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter) if delimiter is not None else None


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


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        "asyncep classify",
        description="Label each row of a file by the log-probability a model gives to each label.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = ".jsonl, .json, .csv, .tsv, .parquet or .arrow file, also with .gz or .zst"
    flags.add_argument("input", type=Path, metavar="IN", help=f"{kinds}; - for standard input")
    flags.add_argument(
        "output", type=Path, metavar="OUT", help="file of one of these kinds to write; - for standard output"
    )
    _add_rows(flags.add_argument_group("rows"))
    _add_prompt(flags.add_argument_group("prompt and labels"))
    _add_where(flags.add_argument_group("where"))
    _add_job(flags.add_argument_group("job"))
    return flags


def _add_rows(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text-field", default="text", metavar="NAME", help="field with the text (default: text)")
    group.add_argument("--gold-field", metavar="NAME", help="field with the true label, for accuracy and confusion")
    group.add_argument("--keep", metavar="A,B,…", help="further fields to carry over to the output, such as an id")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    group.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="i/n",
        help="only part i of n, from 1/n to n/n; give each part an OUT of its own (row numbers stay those of the file)",
    )
    group.add_argument(
        "--input-format",
        metavar="KIND",
        help="jsonl, json, csv, tsv, parquet or arrow, with .gz or .zst (default: by the name; of - jsonl)",
    )
    group.add_argument("--output-format", metavar="KIND", help="the same for OUT")
    group.add_argument(
        "--encoding", metavar="NAME", help="of a file of text, such as cp1252 (default: utf-8, or by byte-order mark)"
    )
    group.add_argument(
        "--delimiter",
        metavar="C",
        help="of CSV and TSV (default: the one of , ; tab | with which the columns are there)",
    )
    group.add_argument(
        "--quote", default='"', metavar="C", help='of CSV and TSV; none reads quotes as other characters (default: ")'
    )
    group.add_argument(
        "--no-header", action="store_true", help="CSV and TSV have no line of names: the columns are called 1, 2, …"
    )


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--labels", metavar="A,B,…", help='the labels to choose from; "one, with a comma" stands in double quotes'
    )
    group.add_argument(
        "--labels-file",
        type=Path,
        metavar="FILE",
        help="the labels from a file: one a line; or .json or .yaml, a list of objects with label, description, words "
        "(that the model may write for it) and threshold",
    )
    group.add_argument(
        "--multi-label",
        action="store_true",
        help="a row may have several labels, or none: each is asked about by itself (one pass a label)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="with --multi-label: a label applies from this probability on (default 0.5)",
    )
    group.add_argument(
        "--other-below", type=float, metavar="P", help="a row whose best label is less probable gets the label --other"
    )
    group.add_argument("--other", metavar="LABEL", help="see --other-below (default: other)")
    group.add_argument(
        "--template",
        metavar="TEXT|@FILE",
        help="the prompt, with {text} once, and {labels} or {descriptions} if wanted; what stands before {text} is "
        "shared by all rows. With --multi-label the question on one {label}",
    )
    group.add_argument(
        "--truncate",
        choices=("head", "tail", "middle"),
        help="leave out this part of a text that is too long for the model (default: the row is an error); OUT says "
        "how many characters",
    )
    group.add_argument(
        "--examples",
        type=Path,
        metavar="FILE",
        help="JSONL with --text-field and --gold-field (default label): shown in every prompt",
    )
    group.add_argument("--chat", action="store_true", help="write the prompt in the model's chat format")
    group.add_argument("--system", metavar="TEXT", help="a system message, with --chat")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="file of texts (--text-field, no labels needed) whose mean score is subtracted from each label's",
    )
    group.add_argument(
        "--calibrate",
        action="append",
        metavar="TEXT",
        help="a neutral text such as N/A, in place of --calibration; may be repeated",
    )
    group.add_argument(
        "--label-length",
        choices=("sum", "mean"),
        default="sum",
        help="score of a label of several tokens: sum (default) or mean of its tokens' log-probabilities",
    )


def _add_where(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--url", help="a running server, such as http://127.0.0.1:30000; give this or --model-path")
    group.add_argument(
        "--api-key", metavar="KEY|@FILE", help="its API key, or a file with it (default: $ASYNCEP_API_KEY)"
    )
    group.add_argument(
        "--model-path",
        metavar="PATH",
        help="start a server for this model, for the length of the job; give this or --url",
    )
    group.add_argument("--dp-size", type=_at_least_one, metavar="N", help="ranks of the started server (default 1)")
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="start one server on each host of this Ray cluster (auto: the cluster of this host)",
    )
    group.add_argument(
        "--ray-nodes", type=_at_least_one, metavar="N", help="hosts of the cluster to use (default: all with CPUs)"
    )


def _add_job(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--restart", action="store_true", help="forget what an unfinished run of this job has done")
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="write over an OUT and a report that are there (never over what is read)",
    )
    group.add_argument(
        "--max-errors",
        default="100%",
        metavar="N|P%",
        help="exit status 1 if more rows have errors: a number, or a share such as 1%% (default: only if all have)",
    )
    group.add_argument(
        "--part-rows",
        type=_at_least_one,
        default=4096,
        metavar="N",
        help="rows planned and written together; a larger N shares more prefixes and takes more memory (default 4096)",
    )
    group.add_argument(
        "--report", type=Path, metavar="FILE", help="where to write the HTML report (default OUT.html; none for -)"
    )
    group.add_argument("--no-report", action="store_true", help="write no HTML report")
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="X",
        help="TFLOP/s the server can do at best, to show MFU (measured where the server is started here)",
    )
    group.add_argument("--batch-rows", type=int, help=argparse.SUPPRESS)
