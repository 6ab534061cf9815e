"""Every kind of file, every compression and encoding: the same rows, or a refusal by name."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import os
import random
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_model import ByteTokens, ToyServer, toy_facts

from asyncep.files.kinds import FileFormat, ReadOptions
from asyncep.files.rows import InputError, Row, RowSource
from asyncep.jobs.run import run_job
from asyncep.jobs.spec import JobSpec
from asyncep.tasks.session import session_with
from asyncep.tasks.task import TaskOptions

TEXTS = ["plain", 'with "quotes"', "a, comma; a semicolon\tand a tab", "two\nlines", "naïve 日本 🙂", " spaces "]
KINDS = ["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
ENDINGS = {"": None, ".gz": "gzip", ".zst": "zstd"}
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def content(kind: str, texts: list[str] = TEXTS, *, stream: bool = False) -> bytes:
    frame = polars.DataFrame({"id": list(range(len(texts))), "text": texts})
    if kind == "jsonl":
        return frame.write_ndjson().encode()
    if kind == "json":
        return json.dumps(frame.to_dicts(), indent=1).encode()
    if kind in ("csv", "tsv"):
        return frame.write_csv(separator="," if kind == "csv" else "\t").encode()
    sink = io.BytesIO()
    if kind == "parquet":
        frame.write_parquet(sink)
    elif stream:
        frame.write_ipc_stream(sink)
    else:
        frame.write_ipc(sink)
    return sink.getvalue()


def packed(whole: bytes, ending: str) -> bytes:
    if ending == ".gz":
        # Two members, as `cat a.gz b.gz` makes.
        middle = len(whole) // 2
        return gzip.compress(whole[:middle]) + gzip.compress(whole[middle:])
    if ending == ".zst":
        middle = len(whole) // 2
        return b"".join(zstandard.compress(part) for part in (whole[:middle], whole[middle:]))
    return whole


def rows(path: Path, *, keep: tuple[str, ...] = (), **options: Any) -> list[Row]:
    source = RowSource(path, keep=keep, options=ReadOptions(**options))
    source.check()
    found = list(source.rows())
    assert source.count() == len(found)
    return found


def job(source: Path, output: Path, keep: tuple[str, ...] = ("id",), part_rows: int = 4096) -> None:
    spec = JobSpec(RowSource(source, keep=keep), output, TaskOptions(["a", "b"], "{text}"), part_rows=part_rows)

    async def run() -> None:
        async with session_with(ToyServer(), ByteTokens(), toy_facts()) as session:
            await run_job(spec, session)

    asyncio.run(run())


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [*KINDS, "arrow stream"])
def test_each_kind_has_the_same_rows(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"in.{kind.split()[0]}{ending}"
    path.write_bytes(packed(content(kind.split()[0], stream="stream" in kind), ending))
    found = rows(path, keep=("id",))
    assert [row.text for row in found] == TEXTS
    assert [int(row.kept["id"]) for row in found] == list(range(len(TEXTS)))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(share=st.floats(0.01, 0.999))
def test_a_compressed_file_that_was_cut_is_refused(tmp_path: Path, kind: str, ending: str, share: float) -> None:
    """Its last bytes are sums over what stands before, so no row is lost in silence."""
    chance = random.Random(1)
    whole = packed(content(kind, ["".join(chance.choices("abcdefgh ", k=200)) for _ in range(200)]), ending)
    path = tmp_path / f"in.{kind}{ending}"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"in\.\w+\.\w+: "):
        # JSONL is read through only by the job itself.
        rows(path)


@FEW
@given(share=st.floats(0, 0.999), stream=st.booleans())
def test_an_arrow_file_that_was_cut_is_refused(tmp_path: Path, share: float, stream: bool) -> None:
    whole = content("arrow", [f"row {i}" for i in range(300)], stream=stream)
    path = tmp_path / "in.arrow"
    path.write_bytes(whole[: int(share * len(whole))])
    try:
        found = rows(path)
    except InputError:
        return
    # A stream ends where a message ends; what is missing then cannot be known.
    assert stream
    assert [row.text for row in found] == [f"row {i}" for i in range(300)][: len(found)]


@FEW
@given(place=st.floats(0, 1), change=st.integers(1, 255), stream=st.booleans())
def test_an_arrow_file_that_was_changed_ends_no_process(
    tmp_path: Path, place: float, change: int, stream: bool
) -> None:
    whole = bytearray(content("arrow", [f"row {i}" for i in range(300)], stream=stream))
    whole[min(len(whole) - 1, int(place * len(whole)))] ^= change
    path = tmp_path / "in.arrow"
    path.write_bytes(whole)
    with contextlib.suppress(InputError):
        assert len(rows(path)) <= 300


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252", "latin-1", "shift_jis"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_encodings(tmp_path: Path, kind: str, encoding: str) -> None:
    texts = ["naïve", "two\nlines", 'é "à"'] if encoding != "shift_jis" else ["日本", "two\nlines", "テキスト"]
    path = tmp_path / f"in.{kind}"
    path.write_bytes(content(kind, texts).decode().encode(encoding))
    # A mark says what the file is in; otherwise it has to be said.
    marked = encoding in ("utf-8-sig", "utf-16", "utf-32")
    assert [row.text for row in rows(path, encoding=None if marked else encoding)] == texts
    assert [row.text for row in rows(path, encoding=encoding)] == texts
    if encoding == "utf-16-le":
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
        assert [row.text for row in rows(path, encoding=encoding)] == texts


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_in_another_encoding_is_refused_with_a_guess(tmp_path: Path, kind: str) -> None:
    texts = [f"Die Straße Nummer {i} führt über die Brücke, schön und größer als früher." for i in range(40)]
    path = tmp_path / f"in.{kind}"
    whole = content(kind, texts).decode()
    if kind == "jsonl":
        whole = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_bytes(whole.encode("cp1252"))
    with pytest.raises(InputError, match=r"40 of the first 40 lines .* are not; it looks like \w+.*--encoding"):
        rows(path)
    path.write_bytes("".join(whole.splitlines(keepends=True)[:4]).encode("cp1252"))
    few = rows(path)
    assert all(row.text is None for row in few)
    assert all(("UTF-8" in (row.error or "") or "not JSON" in (row.error or "")) for row in few)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_the_delimiter_is_the_one_with_which_the_columns_are_there(tmp_path: Path, kind: str, delimiter: str) -> None:
    path = tmp_path / f"in.{kind}"
    path.write_text(polars.DataFrame({"id": [1, 2], "text": ["a,b;c|d", 'e\t"f"']}).write_csv(separator=delimiter))
    assert [row.text for row in rows(path, keep=("id",))] == ["a,b;c|d", 'e\t"f"']
    assert [row.text for row in rows(path, delimiter=delimiter)] == ["a,b;c|d", 'e\t"f"']
    with pytest.raises(InputError, match="no column 'body' among id, text"):
        RowSource(path, "body").check()


def test_other_delimiters_quotes_and_no_header(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("1~it is 5\" long\n2~'so it is'\n")
    found = list(RowSource(path, "2", keep=("1",), options=ReadOptions(delimiter="~", quote="", header=False)).rows())
    assert [row.text for row in found] == ['it is 5" long', "'so it is'"]
    assert [row.kept for row in found] == [{"1": "1"}, {"1": "2"}]
    quoted = RowSource(path, "2", options=ReadOptions(delimiter="~", quote="'", header=False))
    assert [row.text for row in quoted.rows()] == ['it is 5" long', "so it is"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("in.jsonl", {"delimiter": ";"}, "--delimiter: only for CSV and TSV; the input is jsonl"),
        ("in.parquet", {"quote": ""}, "--quote: only for CSV and TSV; the input is parquet"),
        ("in.arrow", {"header": False}, "--no-header: only for CSV and TSV; the input is arrow"),
        ("in.parquet", {"encoding": "latin-1"}, "--encoding: only for files of text"),
        ("in.csv", {"encoding": "latin-99"}, "--encoding 'latin-99': no such encoding"),
        ("in.csv", {"encoding": "hex"}, "--encoding 'hex': no such encoding"),
        ("in.csv", {"delimiter": ";;"}, "--delimiter ';;': one character"),
        ("in.csv", {"quote": "''"}, "--quote .*: one character"),
    ],
)
def test_options_that_a_file_has_no_use_for(tmp_path: Path, name: str, options: Any, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content(name.split(".")[1]))
    with pytest.raises(InputError, match=words):
        rows(path, **options)


def test_formats_by_name() -> None:
    assert str(FileFormat.named("CSV.gz", "--input-format")) == "csv.gz"
    assert FileFormat.of(Path("a.b.JSONL.ZST")) == FileFormat("jsonl", "zstd")
    for wrong in ("xlsx", "csv.rar", "", "gz"):
        with pytest.raises(InputError, match="--input-format"):
            FileFormat.named(wrong, "--input-format")
    for path in ("x", "x.gz", "x.xlsx", "x.tar.gz"):
        with pytest.raises(InputError, match="or name its format"):
            FileFormat.of(Path(path))


def test_a_json_file_may_hold_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_bytes(content("jsonl"))
    assert [row.text for row in rows(path)] == TEXTS
    path.write_text('{"text": "x"')
    assert [row.error is not None for row in RowSource(path).rows()] == [True]
    for wrong in ("[", '["a", ', "[1,]"):
        path.write_text(wrong)
        with pytest.raises(InputError, match="not JSON"):
            rows(path)
    path.write_text('[{"text": "x"}, 5, {"text": 1}]')
    assert [row.error for row in rows(path)] == [
        None,
        "a JSON object is needed, not int",
        "'text': a string is needed, not int",
    ]


def read(path: Path, form: FileFormat) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    if form.compression == "gzip":
        raw = gzip.decompress(raw)
    elif form.compression == "zstd":
        raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read()
    if form.kind == "json":
        found: list[dict[str, Any]] = json.loads(raw)
        return found
    if form.kind == "jsonl":
        return [json.loads(line) for line in raw.splitlines()]
    if form.kind in ("csv", "tsv"):
        return polars.read_csv(raw, separator="," if form.kind == "csv" else "\t").to_dicts()
    return (polars.read_parquet if form.kind == "parquet" else polars.read_ipc)(io.BytesIO(raw)).to_dicts()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_written(tmp_path: Path, kind: str, ending: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / f"out.{kind}{ending}"
    source.write_bytes(content("jsonl", [*TEXTS, ""]))
    job(source, output)
    found = read(output, FileFormat.of(output))
    assert [record["row"] for record in found] == [record["id"] for record in found] == list(range(len(TEXTS) + 1))
    assert [record["label"] in ("a", "b") for record in found[:-1]] == [True] * len(TEXTS)
    assert found[-1]["error"] == "'text' is empty"


TYPED = pyarrow.table(
    {
        "text": ["x", "y", "z"],
        "small": pyarrow.array([1, None, 3], pyarrow.int8()),
        "day": [date(2026, 1, 1), None, date(2026, 1, 3)],
        "price": [Decimal("1.10"), Decimal("2.20"), None],
        "tags": [["a"], [], None],
        "kind": pyarrow.array(["u", "v", None]).dictionary_encode(),
        "when": pyarrow.array([1, 2, None], pyarrow.timestamp("ns", "UTC")),
        "raw": pyarrow.array([b"\xff", b"", None]),
        "nothing": pyarrow.nulls(3),
        "inner": [{"a": 1, "b": "x"}, None, {"a": 2, "b": None}],
        "half": pyarrow.array([1.5, None, 3.0], pyarrow.float32()),
    }
)


@pytest.mark.parametrize("kind_in", ["parquet", "arrow"])
@pytest.mark.parametrize("kind_out", ["parquet", "arrow"])
def test_kept_columns_keep_their_types(tmp_path: Path, kind_in: str, kind_out: str) -> None:
    source, output = tmp_path / f"in.{kind_in}", tmp_path / f"out.{kind_out}"
    if kind_in == "parquet":
        pyarrow.parquet.write_table(TYPED, source)
    else:
        with pyarrow.ipc.new_file(source, TYPED.schema) as writer:
            writer.write_table(TYPED)
    keep = tuple(name for name in TYPED.column_names if name != "text")
    job(source, output, keep, part_rows=2)
    found = pyarrow.parquet.read_table(output) if kind_out == "parquet" else pyarrow.ipc.open_file(output).read_all()
    for name in keep:
        # Each part of the output would have other categories.
        expected = pyarrow.string() if name == "kind" else TYPED.schema.field(name).type
        assert found.schema.field(name).type == expected, name
        assert found[name].to_pylist() == TYPED[name].to_pylist(), name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, None], pyarrow.int64()),
        ([1, 2.5], pyarrow.float64()),
        ([1 << 60, 2.5], pyarrow.string()),
        ([True, False], pyarrow.bool_()),
        ([True, 1], pyarrow.string()),
        (["a", "1"], pyarrow.string()),
        ([[1], [2]], pyarrow.string()),
        ([None, None], pyarrow.string()),
        ([10**30, 1], pyarrow.string()),
        ([1e300, 0.1], pyarrow.float64()),
    ],
)
def test_columns_of_json_have_the_narrowest_type_that_holds_them(
    tmp_path: Path, values: list[Any], expected: Any
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": "t", "v": value}) + "\n" for value in values))
    job(source, tmp_path / "out.parquet", ("v",))
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")["v"]
    assert found.type == expected
    if expected != pyarrow.string():
        assert found.to_pylist() == values
    else:
        assert found.to_pylist() == [
            None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values
        ]


def test_a_column_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    union = pyarrow.UnionArray.from_dense(
        pyarrow.array([0, 1], pyarrow.int8()), pyarrow.array([0, 0], pyarrow.int32()),
        [pyarrow.array([1]), pyarrow.array(["x"])],
    )  # fmt: skip
    table = pyarrow.table({"text": ["x", "y"], "odd": union})
    with pyarrow.ipc.new_file(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="--keep odd: a column of type dense_union"):
        job(tmp_path / "in.arrow", tmp_path / "out.parquet", ("odd",))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_odd_values_are_their_rows_and_nobody_elses(tmp_path: Path, kind: str) -> None:
    deep = "[" * 600 + "]" * 600
    lines = ['{"text": "a", "v": 1e-99999999999999999999}', f'{{"text": "b", "v": {deep}}}', '{"text": "c", "v": 1}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    output = tmp_path / f"out.{kind}"
    job(tmp_path / "in.jsonl", output, ("v",))
    found = read(output, FileFormat.of(output))
    assert [bool(record.get("label")) for record in found] == [True, False, True]
    assert "'v': nested too deep to be written" in found[1]["error"] or "not JSON" in found[1]["error"]
    times = pyarrow.table({"text": ["x", "y"], "when": pyarrow.array([1 << 50, 0], pyarrow.timestamp("s"))})
    pyarrow.parquet.write_table(times, tmp_path / "in.parquet")
    again = tmp_path / f"times.{kind}"
    job(tmp_path / "in.parquet", again, ("when",))
    assert [bool(record.get("label")) for record in read(again, FileFormat.of(again))] == [False, True]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"limit": -1}, "--limit -1: a number of rows"),
        ({"limit": "3"}, "--limit '3'"),
        ({"limit": 2.5}, "--limit 2.5"),
        ({"shard": (2, 2)}, r"--shard \(2, 2\)"),
        ({"shard": (-1, 2)}, "--shard"),
        ({"shard": (0, 0)}, "--shard"),
    ],
)
def test_parts_that_there_are_not(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(content("jsonl"))
    with pytest.raises(InputError, match=words):
        RowSource(tmp_path / "in.jsonl", **fields).check()


def test_a_table_without_names_is_divided_by_what_alone_divides_it(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    nameless = ReadOptions(header=False)
    path.write_text("Hello you;sport\n")
    assert next(RowSource(path, "1", "2", options=nameless).rows()) == Row(0, "Hello you", "sport")
    path.write_text("Hello, you;sport\n")
    with pytest.raises(InputError, match="its first row can be divided by ',' and ';'; say by which: --delimiter"):
        RowSource(path, "1", options=nameless).check()
    path.write_text("one column\nof texts\n")
    assert [row.text for row in RowSource(path, "1", options=nameless).rows()] == ["one column", "of texts"]


def test_files_that_only_look_like_rows(tmp_path: Path) -> None:
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"data": [{"text": "x"}]}, indent=1))
    with pytest.raises(InputError, match="an array of objects, or an object a line, is needed"):
        RowSource(path).check()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="is a pipe, which can be read once; give -"):
        RowSource(tmp_path / "pipe.jsonl").check()


def test_bytes_are_written_in_base64(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "raw": [b"\xff\x00"]}), tmp_path / "in.parquet")
    for kind in ("jsonl", "csv"):
        job(tmp_path / "in.parquet", tmp_path / f"out.{kind}", ("raw",))
        assert read(tmp_path / f"out.{kind}", FileFormat(kind))[0]["raw"] == "/wA="  # type: ignore[arg-type]


def test_a_field_is_kept_once(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(content("jsonl"))
    with pytest.raises(InputError, match="--keep: 'id' is named twice"):
        job(tmp_path / "in.jsonl", tmp_path / "out.csv", ("id", "id"))
