"""The Batch API's memory and runner without a server: killed anywhere, answers twice, bad moments, many at once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_router.keys import NOBODY, Caller
from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.batches import database as database_module
from asyncep_sgl.front.batches.disk import Damaged
from asyncep_sgl.front.batches.lines import RequestLine, answer_line, read_lines
from asyncep_sgl.front.batches.records import ApiError, BatchRecord, FileRecord, read_order, window_seconds
from asyncep_sgl.front.batches.runner import BatchRunner
from asyncep_sgl.front.batches.store import BatchStore, open_store
from asyncep_sgl.front.passage import in_batch

MODEL = "model"
PATH = "/v1/score"


def content(rows: int, path: str = PATH) -> bytes:
    lines = [{"custom_id": f"#{i}", "method": "POST", "url": path, "body": {"row": i}} for i in range(rows)]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


async def uploaded(store: BatchStore, data: bytes, caller: Caller = NOBODY, seconds: int | None = None) -> FileRecord:
    async with await store.files.upload(caller) as upload:
        await upload.write(data)
        return await upload.keep("rows.jsonl", seconds)


async def order(store: BatchStore, rows: int, window: str = "24h", model: str = MODEL) -> BatchRecord:
    file = await uploaded(store, content(rows))
    asked = read_order({"input_file_id": file.id, "endpoint": PATH, "completion_window": window})
    return await store.add_batch(asked, model)


async def ended(store: BatchStore, batch_id: str) -> BatchRecord:
    while (batch := await store.batch(batch_id)).status not in ("completed", "failed", "cancelled", "expired"):
        await asyncio.sleep(0.01)
    return batch


def lines_of(store: BatchStore, batch: BatchRecord) -> list[dict[str, Any]]:
    paths = [store.files.path(file) for file in (batch.output_file, batch.error_file) if file is not None]
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


async def send(path: str, body: bytes) -> tuple[int, bytes]:
    """Every seventh request is refused."""
    assert in_batch.get()
    await asyncio.sleep(0)
    row = json.loads(body)["row"]
    return (400, b'{"error": "no"}') if row % 7 == 3 else (200, json.dumps({"twice": 2 * row}).encode())


def check(lines: list[dict[str, Any]], rows: int) -> None:
    """Every row once, with its own answer."""
    assert sorted(int(line["custom_id"][1:]) for line in lines) == list(range(rows))
    for line in lines:
        row = int(line["custom_id"][1:])
        expected = {"error": "no"} if row % 7 == 3 else {"twice": 2 * row}
        assert line["response"]["body"] == expected
        assert line["error"] is None


def test_killed_at_every_durable_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves is what lies on disk: a copy before each commit, synchronisation and renaming gone on with."""
    rows, folder, copies = 120, tmp_path / "state", list[Path]()

    def copy() -> None:
        copies.append(tmp_path / f"copy-{len(copies)}")
        shutil.copytree(folder, copies[-1])

    fsync, replace = os.fsync, Path.replace

    class Connection:
        """Copies before each commit."""

        def __init__(self, real: Any) -> None:
            self._real = real

        def execute(self, query: str, *values: Any) -> Any:
            if query == "COMMIT":
                copy()
            return self._real.execute(query, *values)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

    def before(function: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            copy()
            return function(*args)

        return wrapped

    async def first() -> str:
        async with open_store(folder) as store:
            store._database._connection = Connection(store._database._connection)  # type: ignore[assignment]
            monkeypatch.setattr(database_module.os, "fsync", before(fsync))
            monkeypatch.setattr(Path, "replace", before(replace))
            batch = await order(store, rows)
            runner = BatchRunner(store, MODEL, send, most=5)
            runner.begin(batch)
            check(lines_of(store, await ended(store, batch.id)), rows)
            monkeypatch.undo()
            await runner.close()
            return batch.id

    batch_id = asyncio.run(first())
    assert len(copies) > 15

    async def again(path: Path) -> str | None:
        async with open_store(path) as store:
            kept = {file.name for file in (path / "files").iterdir()}
            listed = await store.files.page(purpose=None, after=None, limit=9, newest=True)
            assert kept == {file.id for file in listed}
            try:
                before = await store.batch(batch_id)
            except ApiError:
                return None
            runner = BatchRunner(store, MODEL, send, most=5)
            await runner.resume()
            batch = await ended(store, batch_id)
            await runner.close()
            check(lines_of(store, batch), rows)
            assert (batch.status, batch.total, batch.completed + batch.failed) == ("completed", rows, rows)
            return before.status

    found = Counter(asyncio.run(again(path)) for path in copies)
    # Kills before the batch was there, and in each of its states.
    assert found.keys() >= {None, "validating", "in_progress", "finalizing"}


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 8), max_size=10), max_size=6),
    st.sampled_from(["completed", "expired", "cancelled"]),
)
def test_answers_count_once(groups: list[list[int]], final: Any) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with open_store(Path(folder)) as store:
                batch = await order(store, 8)
                requests, _ = read_lines(content(8).splitlines(keepends=True), PATH)
                await store.read(batch.id, 100, len(requests))
                await store.accept(batch.id, requests)
            first: dict[int, int] = {}
            for place, numbers in enumerate(groups):
                # Closed and opened again between any two.
                async with open_store(Path(folder)) as store:
                    await store.requests.keep(batch.id, [(n, 200, str(place).encode()) for n in numbers])
                    for number in numbers:
                        first.setdefault(number, place)
                    found = await store.batch(batch.id)
                    assert found.completed == len(first)
                    await store.requests.release(batch.id)
                    waiting = await store.requests.take(batch.id, 100)
                    assert {r.number for r in waiting} == set(range(1, 9)) - first.keys()
                    await store.requests.release(batch.id)
            async with open_store(Path(folder)) as store:
                for _ in range(2):  # the second as after a kill
                    await store.finish(batch.id, final)
                found = await store.batch(batch.id)
                assert (found.status, found.failed) == (final, 8 - len(first))
                lines = lines_of(store, found)
                assert sorted(line["custom_id"] for line in lines) == [f"#{i}" for i in range(8)]
                for line in lines:
                    number = int(line["custom_id"][1:]) + 1
                    if number in first:
                        assert line["response"]["body"] == first[number]
                    else:
                        assert line["error"]["code"] == f"batch_{'cancelled' if final == 'cancelled' else 'expired'}"

    asyncio.run(run())


@settings(deadline=None)
@given(st.lists(st.sampled_from(["good", "broken", "blank", "twice", "other"]), max_size=12))
def test_lines_are_where_they_are_said_to_be(kinds: list[str]) -> None:
    lines = []
    for number, kind in enumerate(kinds):
        fields = {"custom_id": str(number if kind != "twice" else 0), "url": PATH, "body": {"n": number, "é": "🙂"}}
        if kind == "other":
            fields["url"] = "/v1/other"
        text = json.dumps(fields, ensure_ascii=number % 2 == 0)
        lines.append({"broken": text[:-1], "blank": "  "}.get(kind, text).encode() + b"\n")
    requests, problems = read_lines(lines, PATH)
    raw = b"".join(lines)
    for request in requests:
        found = json.loads(raw[request.offset : request.offset + request.length])
        assert (found["custom_id"], found["body"]["n"]) == (request.custom_id, request.number - 1)
    assert len({request.custom_id for request in requests}) == len(requests)
    good = [kind for kind in kinds if kind != "blank"]
    assert len(requests) + len(problems) == max(1, len(good))
    assert all(problem.line for problem in problems) or not good


def test_a_bad_moment_is_waited_out_and_a_bad_request_is_not(tmp_path: Path) -> None:
    asked: Counter[int] = Counter()

    async def moody(path: str, body: bytes) -> tuple[int, bytes]:
        row = json.loads(body)["row"]
        asked[row] += 1
        if row == 0 and asked[0] <= 2:
            return 503, b"{}"
        if row == 1:
            return 500, b'"broken"'
        return await send(path, body)

    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, 3)
            runner = BatchRunner(store, MODEL, moody, most=2)
            runner.begin(batch)
            done = await ended(store, batch.id)
            assert (done.completed, done.failed) == (2, 1)
            # Once done it is forgotten, so that its files can go.
            await store.files.delete(batch.input_file)
            await runner.close()

    asyncio.run(run())
    assert asked == {0: 3, 1: 3, 2: 1}


def test_batches_take_turns_and_stay_below_the_bound(tmp_path: Path) -> None:
    under_way = most = 0
    seen: list[int] = []

    async def counting(path: str, body: bytes) -> tuple[int, bytes]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        seen.append(json.loads(body)["row"])
        return 200, b"{}"

    async def run() -> None:
        async with open_store(tmp_path) as store:
            runner = BatchRunner(store, MODEL, counting, most=4)
            large, small = await order(store, 400), await order(store, 20)
            other = await order(store, 5, model="another")
            await runner.resume()
            await ended(store, small.id)
            await ended(store, large.id)
            # A batch for another model waits for its server.
            assert (await store.batch(other.id)).status == "validating"
            with pytest.raises(ApiError, match="is being worked on by"):
                await store.files.delete(other.input_file)
            await runner.close()

    asyncio.run(run())
    assert most == 4
    # The small one's last request came long before the large one's: row 19 is in both.
    assert [place for place, row in enumerate(seen) if row == 19][1] < 200


def test_the_window_ends_and_files_expire(tmp_path: Path) -> None:
    now = 1000.0

    async def stuck(path: str, body: bytes) -> tuple[int, bytes]:
        return 503, b"{}"

    async def run() -> None:
        nonlocal now
        async with open_store(tmp_path, clock=lambda: now) as store:
            batch = await order(store, 3, window="1s")
            runner = BatchRunner(store, MODEL, stuck, most=2, clock=lambda: now)
            now += 5
            runner.begin(batch)
            done = await ended(store, batch.id)
            assert (done.status, done.failed, done.times["expired"]) == ("expired", 3, 1005)
            file = await uploaded(store, b"x", seconds=3600)
            now += 3600
            with pytest.raises(ApiError, match="no file"):
                await store.files.get(file.id)
            await store.files.sweep()
            assert not store.files.path(file.id).exists()
            await runner.close()

    asyncio.run(run())


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path):
            with pytest.raises(UsageError, match="another server uses it"):
                async with open_store(tmp_path):
                    pass
        (tmp_path / "state.sqlite").write_bytes(b"this is no database, and long enough to be seen as none" * 40)
        with pytest.raises(Damaged, match=r"state\.sqlite in the server's --asyncep-batch-dir is damaged"):
            async with open_store(tmp_path):
                pass

    asyncio.run(run())


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("30d", 2592000), ("90m", 5400), ("1s", 1)])
def test_windows(text: str, seconds: int) -> None:
    assert window_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "31d", "0s", "-1h", "1e3s", "٣h"])
def test_windows_that_are_none(text: str) -> None:
    with pytest.raises(ApiError, match="completion_window"):
        window_seconds(text)


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"), min_size=1))
def test_an_answer_is_one_line_however_lines_are_split(text: str, name: str) -> None:
    body = json.dumps({"text": text}, ensure_ascii=False)
    [line] = answer_line("batch_1", 1, name, 200, body.encode("utf-8")).decode().splitlines()
    found = json.loads(line)
    assert (found["custom_id"], found["response"]["body"]) == (name, {"text": text})


def test_a_line_knows_its_place() -> None:
    assert read_lines([b"\n", *content(1).splitlines(keepends=True)], PATH)[0] == [
        RequestLine(2, "#0", 1, len(content(1)))
    ]
