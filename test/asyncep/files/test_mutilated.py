"""Files with something wrong in them: every row is in the output, with its answer or its error, or the job is refused.

The rows are counted by readers of the test's own, written from the formats' definitions.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path
from typing import Any

import polars
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.cli import main
from asyncep.client import generate
from asyncep.files.rows import InputError, Row, RowSource
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobSpec
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions

MANY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ROWS = [
    ("plain text", "a"),
    ('with "quotes" in it', "b"),
    ("a, comma", "a"),
    ("two\nlines", "b"),
    ("naïve 日本", "a"),
] * 3
JSONL = "".join(json.dumps({"text": text, "gold": gold}, ensure_ascii=False) + "\n" for text, gold in ROWS).encode()
CSV = polars.DataFrame(ROWS, schema=["text", "gold"], orient="row").write_csv().encode()
UNQUOTED = ("text,gold\n" + "".join(f"row number {i},{'ab'[i % 2]}\n" for i in range(20))).encode()

# What is put in, taken out or put in the place of something else.
QUOTES, ENDS = [b'"', b'""', b'"""'], [b"\n", b"\r", b"\r\n", b"\n\n"]
PIECES = st.sampled_from([*QUOTES, *ENDS, b",", b"\0", b"\xff", b"\xe9", b"\xef\xbb\xbf", b"{", b"}", b" ", b"\\"])
EDITS = st.lists(st.tuples(st.floats(0, 1), PIECES, st.integers(0, 3)), min_size=1, max_size=4)


def mutilated(whole: bytes, edits: list[tuple[float, bytes, int]]) -> bytes:
    for where, piece, dropped in edits:
        place = int(where * len(whole))
        whole = whole[:place] + piece + whole[place + dropped :]
    return whole


def lines_with_something(content: bytes) -> list[int]:
    """Line numbers of a JSONL file's records."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


def csv_rows(content: bytes) -> list[list[str]] | None:
    """RFC 4180, a character at a time; blank lines are no rows. None where a quote is not where it may be."""
    text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    rows: list[list[str]] = []
    row, field, state, touched = [], "", "start", False
    for character in [*text, "end"]:
        ends = character in ("\n", "\r", "end")
        if state == "quoted":
            if character == "end":
                return None
            state, field = ("closing", field) if character == '"' else (state, field + character)
        elif state == "closing" and character == '"':
            state, field = "quoted", field + '"'
        elif character == "," or ends:
            row.append(field)
            touched = touched or character == "," or state != "start"
            if ends:
                rows += [row] if touched else []
                row, touched = [], False
            field, state = "", "start"
        elif state == "closing":
            return None
        elif character == '"' and state == "start":
            state, touched = "quoted", True
        else:
            field, state = field + character, "plain"
    return rows


def read(path: Path, **fields: Any) -> list[Row] | InputError:
    source = RowSource(path, **fields)
    try:
        source.check()
        rows = list(source.rows())
    except InputError as error:
        return error
    assert source.count() == len(rows)
    return rows


def test_the_readers_of_this_test_know_good_files() -> None:
    assert csv_rows(CSV) == [["text", "gold"], *map(list, ROWS)]
    assert csv_rows(b'a\n\n"b""\n"\r\n,\n""\n') == [["a"], ['b"\n'], ["", ""], [""]]
    assert csv_rows(b'a\n"b') is None
    assert csv_rows(b'a\n"b"c\n') is None
    assert len(lines_with_something(JSONL)) == len(ROWS)


@MANY
@given(EDITS)
@example([(0.5, b"\n\n", 0), (0.7, b"\xff", 1)])
def test_each_line_of_jsonl_is_a_row_or_an_error_with_its_number(tmp_path: Path, edits: Any) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(mutilated(JSONL, edits))
    rows = read(path, gold_field="gold", keep=("gold",))
    assert isinstance(rows, list)
    expected = lines_with_something(path.read_bytes())
    assert len(rows) == len(expected)
    for row, line in zip(rows, expected, strict=True):
        if row.text is None:
            assert re.match(rf"line {line}: |'text'", row.error or "")
        else:
            assert (
                row.text == json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")[line - 1])["text"]
            )


@MANY
@given(st.sampled_from([CSV, UNQUOTED]), EDITS)
@example(CSV, [(0.0, b",", 0), (0.375, b'"', 2), (0.5, b",", 0)])
@example(UNQUOTED, [(0.5, b'"', 0)])
@example(CSV, [(0.5, b'"', 0)])
@example(CSV, [(1.0, b'"', 0)])
@example(UNQUOTED, [(0.5, b",", 0), (0.7, b"\0", 0), (0.9, b"\xe9", 0)])
def test_each_row_of_csv_is_a_row_or_an_error_or_the_job_is_refused(tmp_path: Path, whole: bytes, edits: Any) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(mutilated(whole, edits))
    rows = read(path, gold_field="gold", keep=("gold",))
    expected = csv_rows(path.read_bytes())
    if expected is None:
        # Where a row ends is not known: no row is written, and the place is named.
        assert isinstance(rows, InputError)
        assert re.search(r"line \d+: .*begins in line \d+|no column|columns are called", str(rows))
        return
    if isinstance(rows, InputError):
        assert re.search("no column '(text|gold)' among|columns are called", str(rows))
        header = expected[0] if expected else []
        assert [header.count("text"), header.count("gold")] != [1, 1]
        return
    assert len(rows) == len(expected) - 1
    for row, fields in zip(rows, expected[1:], strict=True):
        if len(fields) != len(expected[0]):
            assert re.match(r"line \d+: \d+ fields, and the header has", row.error or "")
        elif any("\udc80" <= character <= "\udcff" for character in "".join(fields)):
            assert re.match(r"line \d+: .*not UTF-8 \(byte 0x", row.error or "")
        else:
            text = fields[expected[0].index("text")]
            assert row.text == (text if text.strip() else None)
            assert row.kept == {"gold": fields[expected[0].index("gold")]}


@FEW
@given(st.sampled_from([("in.csv", CSV), ("in.jsonl", JSONL)]), EDITS, st.sampled_from([".jsonl", ".csv", ".parquet"]))
def test_the_output_has_as_many_rows_as_the_input(tmp_path: Path, file: Any, edits: Any, kind: str) -> None:
    for path in tmp_path.iterdir():
        path.unlink()
    path, output = tmp_path / file[0], tmp_path / f"out{kind}"
    path.write_bytes(mutilated(file[1], edits))
    rows = read(path, keep=("gold",))
    spec = JobSpec(RowSource(path, keep=("gold",)), output, TaskOptions(["a", "b"], "{text}"))

    async def run() -> None:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            await run_job(spec, session)

    if isinstance(rows, InputError):
        with pytest.raises(InputError):
            asyncio.run(run())
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
        return
    asyncio.run(run())
    if kind == ".jsonl":
        found = [json.loads(line) for line in output.read_bytes().splitlines()]
    elif kind == ".csv":
        header, *lines = csv_rows(output.read_bytes()) or [[]]
        found = [{n: v or None for n, v in zip(header, line, strict=True)} for line in lines]
    else:
        found = polars.read_parquet(output).to_dicts()
    assert [int(record["row"]) for record in found] == list(range(len(rows)))
    for record, row in zip(found, rows, strict=True):
        assert (record.get("error") or None) is None or record.get("label") is None
        assert record.get("error") or record.get("label")
        assert (record.get("gold") or None) == (row.kept.get("gold") or None)


def parquet(rows: int = 300, **options: Any) -> bytes:
    table = pyarrow.table({"text": [f"row number {i}" for i in range(rows)], "id": list(range(rows))})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, row_group_size=50, write_page_checksum=True, **options)
    return sink.getvalue()


@MANY
@given(st.sampled_from([parquet(), parquet(compression="none", use_dictionary=False)]), st.floats(0, 1))
def test_a_parquet_file_that_was_cut_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "in.parquet"
    path.write_bytes(whole[: int(share * (len(whole) - 1))])
    rows = read(path)
    assert isinstance(rows, InputError)
    assert "not a Parquet file" in str(rows)


@MANY
@given(
    st.sampled_from([parquet(), parquet(compression="none", use_dictionary=False)]),
    st.floats(0, 0.6),
    st.integers(1, 255),
)
def test_a_page_that_was_changed_is_refused(tmp_path: Path, whole: bytes, share: float, change: int) -> None:
    """The rows of it lie in the first half of these files; the second is the footer."""
    path = tmp_path / "in.parquet"
    place = int(share * len(whole))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    rows = read(path)
    if isinstance(rows, InputError):
        assert re.search(r"not a Parquet file|cannot be read from row \d+ on|can be read", str(rows))
    else:
        assert [row.text for row in rows] == [f"row number {i}" for i in range(300)]


def test_parquet_strings_that_are_no_utf8_are_errors_of_their_rows(tmp_path: Path) -> None:
    values = pyarrow.array([b"fine", b"na\xefve", b"good"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "in.parquet")
    rows = read(tmp_path / "in.parquet")
    assert isinstance(rows, list)
    assert [row.text for row in rows] == ["fine", None, "good"]
    assert "not UTF-8" in (rows[1].error or "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("quote.csv", b'text,gold\n"Hello" he said,a\nb,a\n', r"line 2: .*begins in line 2"),
        ("open.csv", b'text,gold\n"Hello,a\n' + b"x,a\n" * 2000, r"line 2002: .*begins in line 2"),
        ("header.csv", b'"text,gold\na,b\n', "line 2: .*begins in line 1"),
        ("empty.csv", b"", "no column 'text' among none"),
        ("twice.csv", b"text,text\na,b\n", "2 columns are called 'text'"),
        ("gold.csv", b"text,label\na,b\n", "no column 'gold' among text, label; name it with --gold-field"),
        (
            "gold.jsonl",
            b'{"text": "a", "label": "b"}\n' * 3,
            "no line has a field 'gold'; the first has text, label.*--gold",
        ),
        (
            "text.jsonl",
            b'broken\n{"body": "a", "gold": "b"}\n',
            "no line has a field 'text'; the first has body.*--text",
        ),
        ("cut.parquet", parquet()[:-9], "not a Parquet file"),
    ],
)
def test_a_job_of_such_a_file_is_refused_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    command = ["classify", str(tmp_path / name), str(tmp_path / "out.jsonl"), "--labels", "a,b", "--gold-field", "gold"]
    assert main([*command, "--url", "http://127.0.0.1:9"]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def columns(kind: str, names: list[str]) -> bytes:
    """A row or two of these columns, which may be called the same."""
    sink = io.BytesIO()
    table = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"]) for _ in names], names=names)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif kind == "jsonl":
        sink.write(json.dumps(dict.fromkeys(names, "a")).encode() + b"\n")
    else:
        mark = "\t" if kind == "tsv" else ","
        sink.write("\n".join(mark.join(row) for row in (names, ["a"] * len(names), ["b"] * len(names))).encode())
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["text", "id"], None),
        (["text"], "'id'.*--keep"),
        (["body", "id"], "'text'.*--text-field"),
        (["text", "id", "text"], "2 columns are called 'text'"),
        (["text", "id", "id"], "2 columns are called 'id'"),
    ],
)
def test_columns_that_are_missing_or_twice_are_refused_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    names: list[str],
    words: str | None,
) -> None:
    if kind == "jsonl" and len(set(names)) < len(names):
        pytest.skip("an object has each name once")
    monkeypatch.setattr(generate, "_FIRST_WAIT_SECONDS", 0.0)
    (tmp_path / f"in.{kind}").write_bytes(columns(kind, names))
    command = ["classify", str(tmp_path / f"in.{kind}"), str(tmp_path / "out.jsonl"), "--labels", "a,b", "--keep", "id"]
    # Nobody listens there: what is well goes on to fail on that.
    status = main([*command, "--url", "http://127.0.0.1:9"])
    said = capsys.readouterr().err
    if words is None:
        assert status == 1, said
    else:
        assert status == 2, said
        assert re.search(words, said)


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_kept_values_are_what_they_were(tmp_path: Path, kind: str) -> None:
    values = [
        "123456789012345678901234567890", "-9223372036854775809", "18446744073709551616", "0.1234567890123456789",
        "12345678901234567", "1", "1.5", "true", '"007"', '"a\\rb"', '"a\\nb, \\"c\\""', '[12345678901234567890123, 1]',
    ]  # fmt: skip
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"text": "t", "id": {value}}}\n' for value in values))
    output = tmp_path / f"out{kind}"
    spec = JobSpec(RowSource(path, keep=("id",)), output, TaskOptions(["a", "b"], "{text}"))

    async def run() -> None:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            await run_job(spec, session)

    asyncio.run(run())
    if kind == ".jsonl":
        found = [re.search(r'"id":(.*?),"label"', line) for line in output.read_text().splitlines()]
        assert [match[1] for match in found if match] == [value.replace(", 1", ",1") for value in values]
        return
    if kind == ".csv":
        header, *rows = csv_rows(output.read_bytes()) or [[]]
        texts = [row[header.index("id")] for row in rows]
    else:
        texts = polars.read_parquet(output)["id"].to_list()
    expected = [json.loads(value) if value[0] == '"' else value.replace(", 1", ",1") for value in values]
    assert texts == expected
