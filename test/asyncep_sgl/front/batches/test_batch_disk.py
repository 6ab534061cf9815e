"""Small real file systems that are filled: batches wait and go on, deletes and cancels work, nothing is left over."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_api import Api, api, rows, twice

from asyncep_sgl.front.batches.bounds import Bounds

MEGABYTE = 1 << 20
# The floor is what normally keeps room; without it the disk is really full.
NO_FLOOR = Bounds(free_bytes=0)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Others use the disk up, to the last byte."""
    other = disk / "of-others"
    with other.open("ab", buffering=0) as out:
        try:
            while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize) > leave:
                out.write(b"x" * min(free - leave, MEGABYTE))
        except OSError:
            pass
    return other


def left_over(disk: Path) -> list[str]:
    return [path.name for path in (disk / "state" / "files").iterdir() if path.suffix == ".tmp"]


async def waiting(client: Api, batch_id: str) -> dict[str, Any]:
    """A batch that says that it waits, and why."""
    batch = await client.until(batch_id, found=lambda b: b["errors"] is not None)
    assert batch["status"] in ("validating", "in_progress", "finalizing", "cancelling"), batch
    [error] = batch["errors"]["data"]
    assert error["code"] == "waiting"
    assert "space" in error["message"]
    return batch


async def whole(client: Api, batch: dict[str, Any], count: int) -> None:
    """All rows are answered, each once."""
    assert batch["status"] == "completed"
    assert batch["errors"] is None
    lines = await client.lines(batch["output_file_id"])
    assert [line["custom_id"] for line in lines] == [f"#{i}" for i in range(count)]
    assert [line["response"]["body"]["twice"] for line in lines] == [2 * i for i in range(count)]


@pytest.mark.parametrize("bounds", [NO_FLOOR, Bounds()], ids=["no floor", "floor"])
def test_a_disk_that_fills_in_the_middle_of_a_batch(small: Path, bounds: Bounds) -> None:
    count = 600
    go = asyncio.Event()

    async def some(body: dict[str, Any]) -> tuple[int, Any]:
        if body["row"] >= 100:
            await go.wait()
        return 200, {"twice": 2 * body["row"], "more": "y" * 2000}

    async def run() -> None:
        async with api(small / "state", answer=some, bounds=bounds) as client:
            batch = await client.order(rows(count))
            await client.until(batch["id"], found=lambda b: b["request_counts"]["completed"] >= 50)
            other = fill(small)
            go.set()
            found = await waiting(client, batch["id"])
            kept = found["request_counts"]["completed"]
            assert kept < count
            upload = await client.upload(b"x" * MEGABYTE)
            assert upload.status_code == 507, upload.text
            assert "disk" in upload.json()["error"]["message"]
            assert not left_over(small)
            other.unlink()
            client.batches._opened[1].look_again()  # type: ignore[index]
            await whole(client, await client.until(batch["id"]), count)
            # Each row was sent once: what was answered while nothing could be kept was not thrown away.
            assert len(client.seen) == count
            assert not left_over(small)

    asyncio.run(run())


def test_a_batch_goes_on_by_itself(small: Path) -> None:
    """Without anybody's call that could tell it."""

    async def run() -> None:
        async with api(small / "state", bounds=NO_FLOOR) as client:
            file = (await client.upload(rows(50))).json()["id"]
            other = fill(small, leave=40_000)
            body = {"input_file_id": file, "endpoint": "/v1/score", "completion_window": "24h"}
            batch = (await client.call("POST", "/v1/batches", json=body)).json()
            await waiting(client, batch["id"])
            other.unlink()
            await whole(client, await client.until(batch["id"]), 50)

    asyncio.run(run())


def test_deletes_and_cancels_on_a_full_disk(small: Path) -> None:
    async def run() -> None:
        hang = asyncio.Event()

        async def stuck(body: dict[str, Any]) -> tuple[int, Any]:
            await hang.wait()
            return await twice(body)

        async with api(small / "state", answer=stuck, bounds=NO_FLOOR) as client:
            files = [(await client.upload(b"x" * 1000)).json()["id"] for _ in range(300)]
            batches = [await client.order(rows(20)) for _ in range(8)]
            await client.until(batches[-1]["id"], found=lambda b: b["status"] == "in_progress")
            fill(small)
            for batch in batches:
                # Others take what the one before gave up.
                fill(small)
                answer = await client.call("POST", f"/v1/batches/{batch['id']}/cancel")
                assert answer.status_code == 200, answer.text
                assert answer.json()["status"] == "cancelling"
            hang.set()
            # The disk stays full to the brim meanwhile.
            for file in files:
                fill(small)
                answer = await client.call("DELETE", f"/v1/files/{file}")
                assert answer.status_code == 200, answer.text
                assert (await client.call("GET", f"/v1/files/{file}")).status_code == 404
            (small / "of-others").unlink()
            for batch in batches:
                done = await client.until(batch["id"])
                assert done["status"] == "cancelled"
                lines = await client.lines(done["output_file_id"]) + await client.lines(done["error_file_id"])
                assert len(lines) == 20
            # Until then each of them tried to write its end, again and again.
            assert not left_over(small)

    asyncio.run(run())


def test_lists_and_ageing_on_a_full_disk_without_a_reserve(small: Path) -> None:
    async def run() -> None:
        async with api(small / "state", bounds=NO_FLOOR) as client:
            ids = [(await client.upload(b"x" * 30_000)).json()["id"] for _ in range(20)]
            store = client.batches._opened[0]  # type: ignore[index]
            (small / "state" / "ballast").unlink()
            fill(small)
            later = time.time() + 31 * 86400
            store._clock = store.files._clock = lambda: later
            listed = await client.call("GET", "/v1/files")
            assert listed.status_code == 200, listed.text
            # They have had their time, whether or not it could be written down.
            assert listed.json()["data"] == []
            await store.sweep()
            assert not [id for id in ids if store.files.path(id).exists()]
            assert not store.ledger.used.total()

    asyncio.run(run())


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_server_that_starts_on_a_full_disk(small: Path, how: str) -> None:
    count = 200

    async def run() -> None:
        hang = asyncio.Event()

        async def stuck(body: dict[str, Any]) -> tuple[int, Any]:
            if body["row"] > 20:
                await hang.wait()
            return await twice(body)

        state = small / "state"
        async with api(state, answer=stuck, bounds=NO_FLOOR) as client:
            spare = (await client.upload(b"x" * 5000)).json()["id"]
            batch = await client.order(rows(count))
            await client.until(batch["id"], found=lambda b: b["request_counts"]["completed"] >= 8)
            if how == "killed":
                # As a kill leaves it: with what is open.
                subprocess.run(["cp", "-a", str(state), str(small / "left")], check=True)
        if how == "killed":
            subprocess.run(["rm", "-r", str(state)], check=True)
            (small / "left").rename(state)
        (state / "files" / "file-cut-short.tmp").write_bytes(b"x" * 100)
        other = fill(small)
        async with api(state, bounds=NO_FLOOR) as client:
            listed = await client.call("GET", "/v1/files")
            assert listed.status_code == 200, listed.text
            assert (await client.call("DELETE", f"/v1/files/{spare}")).status_code == 200
            assert not left_over(small)
            await waiting(client, batch["id"])
            other.unlink()
            await whole(client, await client.until(batch["id"]), count)

    asyncio.run(run())


def test_a_batch_is_not_begun_without_space_for_its_answers(small: Path) -> None:
    async def run() -> None:
        async with api(small / "state") as client:
            spare = (await client.upload(b"x" * 12 * MEGABYTE)).json()["id"]
            # Their answers are small, but are expected to take some 4 MB.
            batch = await client.order(rows(1500))
            found = await waiting(client, batch["id"])
            assert found["status"] == "validating"
            assert "delete files" in found["errors"]["data"][0]["message"]
            assert not client.seen
            assert (await client.call("DELETE", f"/v1/files/{spare}")).status_code == 200
            await whole(client, await client.until(batch["id"]), 1500)

    asyncio.run(run())


def test_a_window_that_ends_while_a_batch_waits_for_space(small: Path) -> None:
    async def run() -> None:
        async with api(small / "state") as client:
            await client.upload(b"x" * 12 * MEGABYTE)
            batch = await client.until((await client.order(rows(1500), completion_window="1s"))["id"])
            assert batch["status"] == "expired"
            assert "space" in batch["errors"]["data"][0]["message"]

    asyncio.run(run())


def test_uploads_leave_the_floor(small: Path) -> None:
    async def run() -> None:
        floor = 6 * MEGABYTE
        async with api(small / "state", bounds=Bounds(free_bytes=floor)) as client:
            answers = [await client.upload(b"x" * MEGABYTE) for _ in range(14)]
            statuses = [answer.status_code for answer in answers]
            refused = statuses.index(507)
            assert refused >= 3
            assert set(statuses[:refused]) == {200}
            assert set(statuses[refused:]) == {507}
            assert "--asyncep-disk-floor" in answers[-1].json()["error"]["message"]
            found = os.statvfs(small)
            assert found.f_bavail * found.f_frsize >= floor
            assert not left_over(small)

    asyncio.run(run())


def test_space_of_answers_is_given_back(tmp_path: Path) -> None:
    async def large(body: dict[str, Any]) -> tuple[int, Any]:
        return 200, {"twice": 2 * body["row"], "more": "y" * 50_000}

    async def run() -> None:
        async with api(tmp_path, answer=large) as client:
            batch = await client.until((await client.order(rows(300)))["id"])
            await client.batches._opened[0].sweep()  # type: ignore[index]
            size = sum(path.stat().st_size for path in tmp_path.glob("state.sqlite*"))
            assert size < 5 * MEGABYTE
            assert sum(path.stat().st_size for path in (tmp_path / "files").iterdir()) > 15_000_000
            await whole(client, batch, 300)

    asyncio.run(run())
