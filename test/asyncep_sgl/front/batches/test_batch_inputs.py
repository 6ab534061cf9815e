"""The Batch API over HTTP: inputs that are gone or change, and a damaged database."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from local_api import Api, api, on, rows, twice


@pytest.mark.parametrize("how", ["vanished", "truncated", "grown", "a folder", "its record gone"])
def test_an_input_that_is_gone_fails_its_batch(tmp_path: Path, how: str) -> None:
    async def test(client: Api) -> None:
        file = (await client.upload(rows(5))).json()["id"]
        await spoil(tmp_path, file, how)
        order = {"input_file_id": file, "endpoint": "/v1/score", "completion_window": "24h"}
        answer = await client.call("POST", "/v1/batches", json=order)
        if how == "its record gone":
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")
            return
        batch = await client.until(answer.json()["id"])
        assert batch["status"] == "failed"
        [error] = batch["errors"]["data"]
        assert error["code"] == "input_file_unreadable"
        assert str(tmp_path) not in error["message"]
        answer = await client.call("GET", f"/v1/files/{file}/content")
        assert answer.status_code == (200 if how in ("truncated", "grown") else 410)

    on(tmp_path, test)


@pytest.mark.parametrize("how", ["vanished", "truncated", "overwritten"])
def test_an_input_that_goes_while_it_is_worked_on(tmp_path: Path, how: str) -> None:
    """What was answered is kept; the rest is in the error file, with the reason."""
    hang = asyncio.Event()

    async def some(body: dict[str, Any]) -> tuple[int, Any]:
        if body["row"] >= 50:
            await hang.wait()
        return await twice(body)

    async def first() -> dict[str, Any]:
        async with api(tmp_path, answer=some) as client:
            batch = await client.order(rows(500))
            await client.until(batch["id"], found=lambda b: b["request_counts"]["completed"] >= 50)
            if how != "vanished":
                await spoil(tmp_path, batch["input_file_id"], how)
                hang.set()
                return await client.until(batch["id"])
            return batch

    batch = asyncio.run(first())

    async def test(client: Api) -> None:
        if how == "vanished":
            # An open file does not vanish: it is found gone by the next server.
            await spoil(tmp_path, batch["input_file_id"], how)
        done = await client.until(batch["id"])
        assert done["status"] == "failed"
        assert "can" in done["errors"]["data"][0]["message"]
        assert "read" in done["errors"]["data"][0]["message"]
        good = await client.lines(done["output_file_id"])
        bad = await client.lines(done["error_file_id"])
        assert len(good) >= 50
        assert sorted(line["custom_id"] for line in good + bad) == sorted(f"#{i}" for i in range(500))
        assert {line["error"]["code"] for line in bad} == {"batch_failed"}

    if how == "vanished":
        (tmp_path / "files" / batch["input_file_id"]).rename(tmp_path / "aside")
    on(tmp_path, test)


async def spoil(folder: Path, file: str, how: str) -> None:
    path = folder / "files" / file
    if how in ("vanished", "a folder"):
        path.unlink(missing_ok=True)
        if how == "a folder":
            path.mkdir()
    elif how == "truncated":
        with path.open("r+b") as out:
            out.truncate(path.stat().st_size // 2)
    elif how == "grown":
        with path.open("ab") as out:
            out.write(b"{}\n")
    elif how == "overwritten":
        with path.open("r+b") as out:
            out.write(bytes(path.stat().st_size))
    else:
        state = sqlite3.connect(folder / "state.sqlite")
        state.execute("DELETE FROM files")
        state.commit()
        state.close()


def test_a_finished_batch_needs_its_input_no_more(tmp_path: Path) -> None:
    async def run() -> None:
        async with api(tmp_path) as client:
            batch = await client.order(rows(10))
            await client.until(batch["id"])
        state = sqlite3.connect(tmp_path / "state.sqlite")
        # As an end during the writing of its files leaves it.
        state.execute("UPDATE batches SET status = 'finalizing', output_file = NULL")
        state.execute("DELETE FROM files WHERE purpose = 'batch_output'")
        state.commit()
        state.close()
        (tmp_path / "files" / batch["input_file_id"]).unlink()
        async with api(tmp_path) as client:
            assert (await client.until(batch["id"]))["status"] == "completed"

    asyncio.run(run())


@pytest.mark.parametrize("at", ["start", "middle"])
def test_a_damaged_database_is_named(tmp_path: Path, at: str) -> None:
    async def run() -> None:
        async with api(tmp_path) as client:
            for _ in range(30):
                await client.upload(rows(1))
        state = tmp_path / "state.sqlite"
        content = bytearray(state.read_bytes())
        begin = 0 if at == "start" else 4096
        content[begin:] = b"\xa5" * (len(content) - begin)
        state.write_bytes(content)
        async with api(tmp_path) as client:
            answer = await client.call("GET", "/v1/files")
            assert answer.status_code == 503, answer.text
            assert "state.sqlite" in answer.json()["error"]["message"]
            assert "damaged" in answer.json()["error"]["message"]
            assert str(tmp_path) not in answer.text

    asyncio.run(run())
