"""The Batch API over HTTP: whose files and batches, and how many."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_api import Api, on, rows, twice
from starlette.applications import Starlette

from asyncep_router.keys import Caller
from asyncep_sgl.front.batches.api import BatchApi, BatchLife
from asyncep_sgl.front.batches.bounds import Bounds
from asyncep_sgl.front.batches.store import open_store

BOSS = {"boss": Caller("boss", admin=True)}


def test_others_see_nothing_and_the_administrator_sees_all(tmp_path: Path) -> None:
    async def test(client: Api) -> None:
        batches = {who: await client.order(rows(5), who) for who in ("ann", "bob")}
        batches = {who: await client.until(batch["id"], who) for who, batch in batches.items()}
        # Each request was served in its owner's name.
        assert sorted(client.seen) == [("ann", True)] * 5 + [("bob", True)] * 5
        for who, other in (("ann", "bob"), ("bob", "ann"), ("", "ann")):
            batch, file = batches[other]["id"], batches[other]["input_file_id"]
            for method, path in (
                ("GET", f"/v1/files/{file}"),
                ("GET", f"/v1/files/{file}/content"),
                ("DELETE", f"/v1/files/{file}"),
                ("GET", f"/v1/files/{batches[other]['output_file_id']}/content"),
                ("GET", f"/v1/batches/{batch}"),
                ("POST", f"/v1/batches/{batch}/cancel"),
            ):
                answer = await client.call(method, path, who)
                assert answer.status_code == 404, (who, method, path)
                # As for one that is not there.
                assert answer.json()["error"]["code"] == "not_found"
            order = {"input_file_id": file, "endpoint": "/v1/score", "completion_window": "24h"}
            answer = await client.call("POST", "/v1/batches", who, json=order)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_file_id")
            for kind, name in (("batches", batch), ("files", file)):
                assert (await client.call("GET", f"/v1/{kind}?after={name}", who)).status_code == 400
        for who, batch_count, file_count in (("ann", 1, 2), ("bob", 1, 2), ("", 0, 0), ("boss", 2, 4)):
            assert len((await client.call("GET", "/v1/batches", who)).json()["data"]) == batch_count
            assert len((await client.call("GET", "/v1/files", who)).json()["data"]) == file_count
        assert len(await client.lines(batches["ann"]["output_file_id"], "boss")) == 5
        assert (await client.call("DELETE", f"/v1/files/{batches['ann']['input_file_id']}", "boss")).status_code == 200

    on(tmp_path, test, callers=BOSS)


def test_what_an_older_version_left(tmp_path: Path) -> None:
    """Is gone on with; and belongs to the server without keys, the holder of the one key, and the administrator."""
    (tmp_path / "files").mkdir()
    content = rows(3)
    (tmp_path / "files" / "file-old").write_bytes(content)
    old = sqlite3.connect(tmp_path / "state.sqlite")
    old.executescript(
        """PRAGMA journal_mode = WAL;
        CREATE TABLE files (id TEXT PRIMARY KEY, purpose TEXT, filename TEXT, size INTEGER, created_at INTEGER,
            expires_at INTEGER);
        CREATE TABLE batches (id TEXT PRIMARY KEY, model TEXT, endpoint TEXT, input_file TEXT, window TEXT,
            status TEXT, created_at INTEGER, expires_at INTEGER, times TEXT, output_file TEXT, error_file TEXT,
            total INTEGER, completed INTEGER, failed INTEGER, errors TEXT, metadata TEXT, output_seconds INTEGER);
        CREATE TABLE requests (batch TEXT, number INTEGER, custom_id TEXT, offset INTEGER, length INTEGER,
            PRIMARY KEY (batch, number)) WITHOUT ROWID;
        CREATE TABLE answers (batch TEXT, number INTEGER, status INTEGER, body BLOB, PRIMARY KEY (batch, number));
        """
    )
    old.execute("INSERT INTO files VALUES ('file-old', 'batch', 'rows.jsonl', ?, 1, NULL)", (len(content),))
    old.execute(
        """INSERT INTO batches VALUES ('batch_old', 'model', '/v1/score', 'file-old', '24h', 'in_progress', 1, ?,
        '{"in_progress": 1}', NULL, NULL, 3, 1, 0, '[]', 'null', NULL)""",
        (2**40,),
    )
    at = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        old.execute("INSERT INTO requests VALUES ('batch_old', ?, ?, ?, ?)", (number, f"#{number - 1}", at, len(line)))
        at += len(line)
    old.execute("INSERT INTO answers VALUES ('batch_old', 1, 200, '{\"twice\": 0}')")
    old.commit()
    old.close()

    async def test(client: Api) -> None:
        for who in ("", "default", "boss"):
            batch = await client.until("batch_old", who)
            assert batch["status"] == "completed"
            lines = await client.lines(batch["output_file_id"], who)
            assert [line["response"]["body"] for line in lines] == [{"twice": 2 * i} for i in range(3)]
        assert client.seen == [("", True)] * 2
        assert (await client.call("GET", "/v1/batches/batch_old", "ann")).status_code == 404
        # Kept for ever until now; from now on as long as any.
        assert (await client.call("GET", "/v1/files/file-old")).json()["expires_at"] > 1

    on(tmp_path, test, callers=BOSS)


def test_a_later_versions_folder_is_left_alone(tmp_path: Path) -> None:
    later = sqlite3.connect(tmp_path / "state.sqlite")
    later.execute("PRAGMA user_version = 99")
    later.close()

    async def test(client: Api) -> None:
        answer = await client.call("GET", "/v1/files")
        assert answer.status_code == 503
        assert str(tmp_path) not in answer.text

    on(tmp_path, test)


def test_owners_take_turns(tmp_path: Path) -> None:
    order: list[str] = []

    chance = random.Random(0)

    async def answer(body: dict[str, Any]) -> tuple[int, Any]:
        # Of uneven length: where all end at once, an owner of one batch asks for one place when four are given away.
        await asyncio.sleep(chance.uniform(0.002, 0.02))
        return await twice(body)

    async def test(client: Api) -> None:
        large = [await client.order(rows(200), "ann") for _ in range(5)]
        small = await client.order(rows(20), "bob")
        await client.until(small["id"], "bob")
        order.extend(name for name, _ in client.seen)
        for batch in large:
            await client.until(batch["id"], "ann")

    on(tmp_path, test, answer=answer, most=4)
    # From bob's first request on every other one is bob's, though ann has five batches.
    begun = order.index("bob")
    last = max(place for place, name in enumerate(order) if name == "bob")
    assert last - begun < 60


def test_a_servers_end_is_complete_when_it_is_said_to_be(tmp_path: Path) -> None:
    """A server stops its loop then; what was under way is no suspect for the next one."""

    async def run() -> None:
        app = Starlette()
        batches = BatchApi(app, tmp_path, "model", most=1)
        app.routes.extend(batches.routes())
        said: list[str] = []
        asked: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def send(message: Any) -> None:
            said.append(message["type"])
            if message["type"] == "lifespan.startup.complete":
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                    assert (await client.get("/v1/files")).status_code == 200
                asked.put_nowait({"type": "lifespan.shutdown"})
            else:
                assert (tmp_path / "in-order").exists()
                async with open_store(tmp_path):
                    pass

        asked.put_nowait({"type": "lifespan.startup"})
        await BatchLife(app, batches)({"type": "lifespan", "app": app, "state": {}}, asked.get, send)
        assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    asyncio.run(run())


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
@pytest.mark.parametrize(
    ("callers", "bounds", "word"),
    [
        ({"ann": Caller("ann", file_bytes=100_000)}, Bounds(), "file_bytes"),
        ({"ann": Caller("default")}, Bounds(file_bytes=100_000), "--asyncep-file-quota"),
        # Others of the key file can always have as much as the one who has most.
        ({"ann": Caller("ann")}, Bounds(file_bytes=200_000), "--asyncep-file-quota"),
    ],
    ids=["own", "all", "share"],
)
def test_a_quota_ends_an_upload_early(
    tmp_path: Path, callers: dict[str, Caller], bounds: Bounds, word: str, declared: bool
) -> None:
    async def test(client: Api) -> None:
        assert (await client.upload(b"x" * 60_000, "ann")).status_code == 200
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            yield b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
            for _ in range(1000):
                read += 10_000
                yield b"x" * 10_000
            yield b"\r\n--b--\r\n"

        # What httpx sends of a generator is chunked; with the header it is not.
        headers = {"who": "ann", "content-type": "multipart/form-data; boundary=b"}
        if declared:
            headers["content-length"] = str(1000 * 10_000 + 200)
        answer = await client.client.post("/v1/files", content=body(), headers=headers)
        assert answer.status_code == 413, answer.text
        assert word in answer.json()["error"]["message"]
        assert "delete" in answer.json()["error"]["message"]
        # httpx's in-process transport hands one piece on only when it is asked for it.
        assert read <= (0 if declared else 60_000)
        assert [path.name for path in (tmp_path / "files").iterdir() if path.suffix == ".tmp"] == []
        # Nothing of it is counted; what fits is taken, and deleting makes room.
        first = (await client.upload(b"x" * 30_000, "ann")).json()["id"]
        assert (await client.upload(b"x" * 30_000, "ann")).status_code == 413
        assert (await client.call("DELETE", f"/v1/files/{first}", "ann")).status_code == 200
        assert (await client.upload(b"x" * 30_000, "ann")).status_code == 200

    on(tmp_path, test, callers=callers, bounds=bounds)


def test_uploads_at_the_same_time_share_the_quota(tmp_path: Path) -> None:
    async def test(client: Api) -> None:
        answers = await asyncio.gather(*(client.upload(b"x" * 300_000) for _ in range(10)))
        statuses = sorted(answer.status_code for answer in answers)
        # Those refused had been counted as long as they came, so that fewer than three may have fitted.
        assert 1 <= statuses.count(200) <= 3
        assert set(statuses) == {200, 413}
        used = sum(path.stat().st_size for path in (tmp_path / "files").iterdir())
        assert used == 300_000 * statuses.count(200)
        # What was refused left nothing behind.
        for _ in range(3 - statuses.count(200)):
            assert (await client.upload(b"x" * 300_000)).status_code == 200

    on(tmp_path, test, bounds=Bounds(file_bytes=1_000_000))


def test_numbers_of_files_and_batches(tmp_path: Path) -> None:
    hang = asyncio.Event()

    async def stuck(body: dict[str, Any]) -> tuple[int, Any]:
        await hang.wait()
        return await twice(body)

    async def test(client: Api) -> None:
        bounds = client.batches._bounds
        files = [(await client.upload(rows(1), "ann")).json()["id"] for _ in range(bounds.files)]
        refused = await client.upload(rows(1), "ann")
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "too_many_files")
        assert (await client.upload(rows(1), "bob")).status_code == 200
        order = {"input_file_id": files[0], "endpoint": "/v1/score", "completion_window": "24h"}
        batches = [(await client.call("POST", "/v1/batches", "ann", json=order)).json() for _ in range(3)]
        refused = await client.call("POST", "/v1/batches", "ann", json=order)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_batches")
        assert "3 unfinished batches" in refused.json()["error"]["message"]
        hang.set()
        for batch in batches:
            await client.until(batch["id"], "ann")
        # The oldest that have ended make room.
        for _ in range(4):
            batch = (await client.call("POST", "/v1/batches", "ann", json=order)).json()
            await client.until(batch["id"], "ann")
        listed = (await client.call("GET", "/v1/batches", "ann")).json()["data"]
        assert len(listed) == bounds.batches
        assert listed[0]["id"] == batch["id"]

    on(tmp_path, test, answer=stuck, bounds=Bounds(files=5, unfinished=3, batches=4))


def test_files_and_batches_age(tmp_path: Path) -> None:
    now = 1_000_000.0

    async def run() -> None:
        nonlocal now
        async with open_store(tmp_path, bounds=Bounds(file_days=2), clock=lambda: now) as store:
            ids = []
            for seconds in (None, 3600, 30 * 86400):
                async with await store.files.upload(Caller("ann")) as upload:
                    await upload.write(b"x")
                    ids.append(await upload.keep("x", seconds))
            assert [file.expires_at for file in ids] == [now + 2 * 86400, now + 3600, now + 2 * 86400]
            now += 3600
            await store.sweep()
            assert store.ledger.used["ann"] == store.ledger.files["ann"] == 2
            now += 2 * 86400
            await store.sweep()
            assert store.ledger.used["ann"] == store.ledger.files["ann"] == 0
            assert list((tmp_path / "files").iterdir()) == []

    asyncio.run(run())


def test_ended_batches_are_forgotten(tmp_path: Path) -> None:
    now = 1_000_000.0

    async def test(client: Api) -> None:
        batch = await client.until((await client.order(rows(2)))["id"])
        store = client.batches._opened[0]  # type: ignore[index]
        store._clock = store.files._clock = lambda: now
        now_then = batch["completed_at"]
        nonlocal_set(now_then + 86400 - 1)
        await store.sweep()
        assert (await client.call("GET", f"/v1/batches/{batch['id']}")).status_code == 200
        nonlocal_set(now_then + 86400)
        await store.sweep()
        assert (await client.call("GET", f"/v1/batches/{batch['id']}")).status_code == 404

    def nonlocal_set(value: float) -> None:
        nonlocal now
        now = value

    on(tmp_path, test, bounds=Bounds(file_days=1))
