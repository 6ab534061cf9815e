"""Lines that end the server: good lines are answered once, deadly ones are errors, and restarts come to an end."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from local_api import ENDS, PATH, rows

from asyncep_router.keys import NOBODY
from asyncep_sgl.front.batches.records import BatchRecord, read_order
from asyncep_sgl.front.batches.runner import MOST_QUARANTINED, BatchRunner
from asyncep_sgl.front.batches.store import BatchStore, end_in_order, open_store

MODEL = "model"
Kills = Callable[[int], bool]


async def order(store: BatchStore, count: int, first: int = 0) -> BatchRecord:
    async with await store.files.upload(NOBODY) as upload:
        await upload.write(rows(count, first=first))
        file = await upload.keep("rows.jsonl")
    asked = read_order({"input_file_id": file.id, "endpoint": PATH, "completion_window": "24h"})
    return await store.add_batch(asked, MODEL)


def lines_of(store: BatchStore, file: str | None) -> dict[int, dict[str, Any]]:
    """Lines of a file by row; each row once."""
    lines = [json.loads(line) for line in store.files.path(file).read_bytes().splitlines()] if file else []
    found = {int(line["custom_id"][1:]): line for line in lines}
    assert len(found) == len(lines)
    return found


async def ended(store: BatchStore, batch_id: str) -> BatchRecord:
    while (batch := await store.batch(batch_id)).status not in ENDS:
        await asyncio.sleep(0.01)
    return batch


async def serve(folder: Path, next_life: Path, deadly: Kills, batches: list[str], most: int) -> bool:
    """Works on a folder until its batches have ended, or until a deadly line ends the server; True if one did.

    What lies on disk at that moment is what the next server finds: it is copied then, as a kill would leave it.
    """
    dead = asyncio.Event()
    under_way = 0

    async def send(path: str, body: bytes) -> tuple[int, bytes]:
        nonlocal under_way
        row = json.loads(body)["row"]
        under_way += 1
        await asyncio.sleep(0)
        if dead.is_set() or deadly(row):
            if not dead.is_set():
                shutil.copytree(folder, next_life)
                dead.set()
            await asyncio.Event().wait()
        under_way -= 1
        return 200, json.dumps({"twice": 2 * row}).encode()

    async with open_store(folder) as store:
        runner = BatchRunner(store, MODEL, send, most=most)
        await runner.resume()
        done = asyncio.gather(*(ended(store, batch) for batch in batches))
        death = asyncio.create_task(dead.wait())
        await asyncio.wait({asyncio.ensure_future(done), death}, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        death.cancel()
        await runner.close()
    return dead.is_set()


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sets(st.integers(0, 35), max_size=8),
    st.integers(1, 6),
)
def test_any_lines_may_be_deadly(sizes: list[int], deadly: set[int], most: int) -> None:
    firsts = [12 * place for place in range(len(sizes))]
    all_rows = {first + i for first, size in zip(firsts, sizes, strict=True) for i in range(size)}
    deadly &= all_rows

    async def run() -> None:
        with tempfile.TemporaryDirectory() as name:
            folder, deaths = Path(name) / "life-0", 0
            async with open_store(folder) as store:
                batches = [await order(store, size, first) for size, first in zip(sizes, firsts, strict=True)]
            ids = [batch.id for batch in batches]
            while await serve(folder, following := Path(name) / f"life-{deaths + 1}", deadly.__contains__, ids, most):
                deaths += 1
                folder = following
                assert deaths <= 2 * len(deadly)
            async with open_store(folder) as store:
                good, bad = dict[int, Any](), dict[int, Any]()
                for batch_id in ids:
                    batch = await store.batch(batch_id)
                    assert batch.status == "completed"
                    good |= lines_of(store, batch.output_file)
                    bad |= lines_of(store, batch.error_file)
                    assert batch.completed + batch.failed == batch.total
            assert {row: line["response"]["body"] for row, line in good.items()} == {
                row: {"twice": 2 * row} for row in all_rows - deadly
            }
            assert bad.keys() == deadly
            for line in bad.values():
                assert line["response"] is None
                assert line["error"]["code"] == "quarantined"
                assert "quarantined" in line["error"]["message"]

    asyncio.run(run())


def test_a_suspect_is_alone(tmp_path: Path) -> None:
    """Also beside other batches; and those come to their turn in between."""
    under_way, seen = 0, list[tuple[int, int]]()

    async def send(path: str, body: bytes) -> tuple[int, bytes]:
        nonlocal under_way
        under_way += 1
        row = json.loads(body)["row"]
        await asyncio.sleep(0.001)
        seen.append((row, under_way))
        under_way -= 1
        return 200, b"{}"

    async def run() -> None:
        async with open_store(tmp_path / "now") as store:
            first = await order(store, 20)
            ids = [first.id, (await order(store, 200, 1000)).id]
        # The server ends with the first four under way.
        await serve(tmp_path / "now", following := tmp_path / "next", lambda row: row == 3, [first.id], 4)
        async with open_store(following) as store:
            suspects = {line.number - 1 for line in await store.requests.suspects(first.id, 100)}
            assert 3 in suspects
            runner = BatchRunner(store, MODEL, send, most=4)
            await runner.resume()
            for batch_id in ids:
                assert (await ended(store, batch_id)).status == "completed"
            await runner.close()
            assert {row for row, beside in seen if row in suspects and beside != 1} == set()
            assert max(beside for _, beside in seen) == 4

    asyncio.run(run())


def test_an_end_in_order_makes_no_suspects(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path / "now") as store:
            batch = await order(store, 20)
        await serve(tmp_path / "now", following := tmp_path / "next", lambda row: row == 3, [batch.id], 4)
        end_in_order(following)
        async with open_store(following) as store:
            assert not await store.requests.suspects(batch.id, 1)
            assert len(await store.requests.take(batch.id, 100)) == 20
        # That was one end; after this one, not in order, they are.
        async with open_store(following) as store:
            assert await store.requests.suspects(batch.id, 1)

    asyncio.run(run())


def test_a_batch_that_only_kills_is_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        folder, deaths = tmp_path / "life-0", 0
        async with open_store(folder) as store:
            batch = await order(store, 60)
        while await serve(folder, following := tmp_path / f"life-{deaths + 1}", lambda _: True, [batch.id], 4):
            deaths += 1
            folder = following
            assert deaths < 60
        assert deaths <= MOST_QUARANTINED + 2
        async with open_store(folder) as store:
            done = await store.batch(batch.id)
            assert (done.status, done.failed) == ("failed", 60)
            assert "quarantined" in done.errors[0]["message"]
            codes = [line["error"]["code"] for line in lines_of(store, done.error_file).values()]
            assert codes.count("quarantined") == MOST_QUARANTINED + 1
            assert codes.count("batch_failed") == 60 - MOST_QUARANTINED - 1

    asyncio.run(run())


def test_a_file_that_kills_its_reader_is_given_up(tmp_path: Path) -> None:
    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, 3)
            # As ends during the reading leave it.
            for _ in range(3):
                await store.reading(batch.id)
            runner = BatchRunner(store, MODEL, never, most=4)
            runner.begin(batch)
            done = await ended(store, batch.id)
            assert done.status == "failed"
            assert "quarantined" in done.errors[0]["message"]
            await runner.close()

    asyncio.run(run())


async def never(path: str, body: bytes) -> tuple[int, bytes]:
    raise AssertionError("nothing is to be sent")


@pytest.mark.parametrize(
    ("body", "times"), [(b'{"error": {"message": "quarantined: it ended two ranks"}}', 1), (b'{"error": "broken"}', 3)]
)
def test_what_the_engine_has_quarantined_is_final(tmp_path: Path, body: bytes, times: int) -> None:
    sent = 0

    async def send(path: str, _: bytes) -> tuple[int, bytes]:
        nonlocal sent
        sent += 1
        return 500, body

    async def run() -> None:
        async with open_store(tmp_path) as store:
            batch = await order(store, 1)
            runner = BatchRunner(store, MODEL, send, most=4)
            runner.begin(batch)
            done = await ended(store, batch.id)
            [line] = lines_of(store, done.error_file).values()
            assert line["response"]["status_code"] == 500
            assert line["response"]["body"] == json.loads(body)
            await runner.close()

    asyncio.run(run())
    assert sent == times


SERVER = """
import asyncio, json, os, signal, sys
from pathlib import Path
from asyncep_sgl.front.batches.runner import BatchRunner
from asyncep_sgl.front.batches.store import open_store

async def send(path, body):
    row = json.loads(body)["row"]
    await asyncio.sleep(0.001)
    if row in (5, 700):
        os.kill(os.getpid(), signal.SIGKILL)
    return 200, json.dumps({"twice": 2 * row}).encode()

async def main():
    async with open_store(Path(sys.argv[1])) as store:
        runner = BatchRunner(store, "model", send, most=16)
        await runner.resume()
        await asyncio.gather(*runner._tasks.values())

asyncio.run(main())
"""


def test_a_process_that_is_killed_by_two_lines(tmp_path: Path) -> None:
    async def make() -> str:
        async with open_store(tmp_path) as store:
            return (await order(store, 1000)).id

    batch_id, deaths = asyncio.run(make()), 0
    while (done := subprocess.run([sys.executable, "-c", SERVER, str(tmp_path)], check=False)).returncode:
        assert done.returncode == -signal.SIGKILL
        deaths += 1
        assert deaths <= 4

    async def look() -> None:
        async with open_store(tmp_path) as store:
            batch = await store.batch(batch_id)
            assert (batch.status, batch.completed, batch.failed) == ("completed", 998, 2)
            assert lines_of(store, batch.error_file).keys() == {5, 700}

    asyncio.run(look())
    assert deaths == 4
