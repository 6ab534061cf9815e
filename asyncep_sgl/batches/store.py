"""The Batch API's memory: a folder with a SQLite database and the files, whole after a kill at any point.

    state.sqlite   files, batches, and of unfinished batches each request's place and answer
    files/ID       the contents of a file; written under another name, synchronised, renamed, and then entered
    lock           held by the server that works on the folder

Every change of the database is one transaction. An answer is kept once: what comes for a request that has one is
dropped, so that a request computed twice (before a kill and after) is there once. A batch's files are written whole
from its answers before the transaction that names them; written twice, they are the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import aiosqlite
import orjson

from asyncep_sgl.batches.database import Database, whole
from asyncep_sgl.batches.files import IS_UNFINISHED, FileStore
from asyncep_sgl.batches.lines import Problem, RequestLine, answer_line, unanswered_line
from asyncep_sgl.batches.records import UNFINISHED, ApiError, BatchRecord, FileRecord, Order, Status
from asyncep_sgl.errors import UsageError

_PAGE = 500

Answer = tuple[int, int, bytes]
"""Line of the request, HTTP status, body."""
Final = Literal["completed", "expired", "cancelled"]


class BatchStore:
    """Use `open_store`. For one event loop; its methods may be called together."""

    def __init__(self, folder: Path, database: Database, clock: Callable[[], float]) -> None:
        self.files = FileStore(folder / "files", database, clock)
        self._database, self._clock = database, clock

    # Batches

    async def add_batch(self, order: Order, model: str) -> BatchRecord:
        """A new batch, to be validated.

        Raises:
            ApiError: 400; no such input file, or not one for batches.
        """
        try:
            file = await self.files.get(order.input_file)
        except ApiError as error:
            raise ApiError(400, f"input_file_id: {error.message}", param="input_file_id") from error
        if file.purpose != "batch":
            raise ApiError(
                400,
                f"input_file_id: {file.id} has the purpose {file.purpose!r}; upload it with 'batch'",
                param="input_file_id",
            )
        now = int(self._clock())
        batch_id = f"batch_{uuid.uuid4().hex}"
        values = {
            "id": batch_id,
            "model": model,
            "endpoint": order.endpoint,
            "input_file": file.id,
            "window": order.window,
            "status": "validating",
            "created_at": now,
            "expires_at": now + order.seconds,
            "times": "{}",
            "output_file": None,
            "error_file": None,
            "total": 0,
            "completed": 0,
            "failed": 0,
            "errors": "[]",
            "metadata": orjson.dumps(order.metadata).decode(),
            "output_seconds": order.output_seconds,
        }
        async with self._database.change():
            await self._database.insert("batches", values)
        return await self.batch(batch_id)

    async def batch(self, batch_id: str) -> BatchRecord:
        """A batch as it stands.

        Raises:
            ApiError: 404; there is none.
        """
        rows = await self._database.rows("SELECT * FROM batches WHERE id = ?", (batch_id,))
        if not rows:
            raise ApiError(404, f"no batch {batch_id!r}", param="batch_id", code="not_found")
        return _batch(rows[0])

    async def batches(self, *, after: str | None, limit: int) -> list[BatchRecord]:
        """Batches, the newest first, those after the one named `after`."""
        return [_batch(row) for row in await self._database.page("batches", after=after, limit=limit, newest=True)]

    async def unfinished(self, model: str) -> list[BatchRecord]:
        """What is to be done for this model, the oldest first."""
        query = f"SELECT * FROM batches WHERE model = ? AND {IS_UNFINISHED} ORDER BY rowid"
        return [_batch(row) for row in await self._database.rows(query, (model,))]

    async def accept(self, batch_id: str, requests: Sequence[RequestLine]) -> None:
        """The input file is good: its requests are to be done."""
        async with self._database.change():
            await self._database.execute_many(
                "INSERT INTO requests VALUES (?, ?, ?, ?, ?)",
                [(batch_id, r.number, r.custom_id, r.offset, r.length) for r in requests],
            )
            await self._database.execute("UPDATE batches SET total = ? WHERE id = ?", (len(requests), batch_id))
            await self._move(batch_id, "in_progress", ("validating",))

    async def refuse(self, batch_id: str, problems: Sequence[Problem]) -> None:
        """The input file is not good: the batch has failed."""
        errors = orjson.dumps([problem.as_json() for problem in problems]).decode()
        async with self._database.change():
            await self._database.execute("UPDATE batches SET errors = ? WHERE id = ?", (errors, batch_id))
            await self._move(batch_id, "failed", UNFINISHED)

    async def cancel(self, batch_id: str) -> BatchRecord:
        """Asks for a batch's end; asking again changes nothing.

        Raises:
            ApiError: 404; there is none. 409; it has ended.
        """
        batch = await self.batch(batch_id)
        async with self._database.change():
            await self._move(batch_id, "cancelling", ("validating", "in_progress"))
        batch = await self.batch(batch_id)
        if batch.status not in ("cancelling", "cancelled"):
            raise ApiError(409, f"{batch_id} is {batch.status} and can no longer be cancelled")
        return batch

    async def finalizing(self, batch_id: str) -> None:
        """Every request has its answer."""
        async with self._database.change():
            await self._move(batch_id, "finalizing", ("in_progress",))

    async def finish(self, batch_id: str, final: Final) -> None:
        """Writes a batch's files from its answers, and ends it; does nothing to one that has ended."""
        batch = await self.batch(batch_id)
        if batch.status not in UNFINISHED:
            return
        output, errors = (
            self.files.path(f"file-{batch_id.removeprefix('batch_')}-{kind}") for kind in ("output", "error")
        )
        why: Literal["cancelled", "expired"] = "cancelled" if final == "cancelled" else "expired"
        with whole(output) as good, whole(errors) as bad:

            def write(rows: Sequence[Any]) -> None:
                for row in rows:
                    number, name, status = row["number"], row["custom_id"], row["status"]
                    if status is None:
                        bad.write(unanswered_line(batch_id, number, name, why))
                    else:
                        (good if status == 200 else bad).write(answer_line(batch_id, number, name, status, row["body"]))

            # In threads: the server has others to answer meanwhile, and a disk may take its time.
            async for rows in self._answered(batch_id):
                await asyncio.to_thread(write, rows)
            for file in (good, bad):
                file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
        now = int(self._clock())
        expires = None if batch.output_seconds is None else now + batch.output_seconds
        async with self._database.change():
            for path, column in ((output, "output_file"), (errors, "error_file")):
                if size := path.stat().st_size:
                    name = f"{batch_id}_{column.removesuffix('_file')}.jsonl"
                    await self.files.enter(FileRecord(path.name, "batch_output", name, size, now, expires))
                    await self._database.execute(f"UPDATE batches SET {column} = ? WHERE id = ?", (path.name, batch_id))
                else:
                    path.unlink()
            # Requests without an answer have failed, too.
            await self._database.execute("UPDATE batches SET failed = total - completed WHERE id = ?", (batch_id,))
            await self._move(batch_id, final, UNFINISHED)
            for table in ("requests", "answers"):
                await self._database.execute(f"DELETE FROM {table} WHERE batch = ?", (batch_id,))

    # Requests

    async def waiting(self, batch_id: str, after: int, limit: int) -> list[RequestLine]:
        """Requests without an answer that stand after line `after`."""
        query = """SELECT number, custom_id, offset, length FROM requests AS r WHERE batch = ? AND number > ?
            AND NOT EXISTS (SELECT 1 FROM answers AS a WHERE a.batch = r.batch AND a.number = r.number)
            ORDER BY number LIMIT ?"""
        return [RequestLine(*row) for row in await self._database.rows(query, (batch_id, after, limit))]

    async def keep(self, batch_id: str, answers: Iterable[Answer]) -> None:
        """Keeps answers; one for a request that has one is dropped."""
        async with self._database.change():
            for number, status, body in answers:
                new = await self._database.execute(
                    "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (batch_id, number, status, body)
                )
                column = "completed" if status == 200 else "failed"
                await self._database.execute(
                    f"UPDATE batches SET {column} = {column} + ? WHERE id = ?", (new, batch_id)
                )

    async def _answered(self, batch_id: str) -> AsyncIterator[Sequence[Any]]:
        query = """SELECT r.number, r.custom_id, a.status, a.body FROM requests AS r LEFT JOIN answers AS a
            ON a.batch = r.batch AND a.number = r.number
            WHERE r.batch = ? AND r.number > ? ORDER BY r.number LIMIT ?"""
        after = 0
        while rows := await self._database.rows(query, (batch_id, after, _PAGE)):
            yield rows
            after = rows[-1]["number"]

    async def _move(self, batch_id: str, status: Status, out_of: Sequence[Status]) -> None:
        marks = ",".join("?" * len(out_of))
        await self._database.execute(
            f"""UPDATE batches SET status = ?, times = json_set(times, ?, ?) WHERE id = ? AND status IN ({marks})""",
            (status, f"$.{status}", int(self._clock()), batch_id, *out_of),
        )


@contextlib.asynccontextmanager
async def open_store(folder: Path, *, clock: Callable[[], float] = time.time) -> AsyncIterator[BatchStore]:
    """The store in a folder, made if need be and locked meanwhile.

    Args:
        clock: seconds since 1970.

    Raises:
        UsageError: the folder cannot be used, or another server uses it.
    """
    async with AsyncExitStack() as stack:
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--asyncep-batch-dir {folder}: another server uses it; give each its own") from None
        except OSError as error:
            raise UsageError(f"--asyncep-batch-dir {folder}: {error.strerror}; give a folder to write to") from error
        database = Database(
            await stack.enter_async_context(aiosqlite.connect(folder / "state.sqlite", isolation_level=None))
        )
        try:
            await database.prepare()
        except aiosqlite.DatabaseError as error:
            raise UsageError(f"--asyncep-batch-dir {folder}: state.sqlite: {error}; give another folder") from error
        store = BatchStore(folder, database, clock)
        await store.files.tidy()
        yield store


def _batch(row: Any) -> BatchRecord:
    values = dict(row)
    for column in ("times", "errors", "metadata"):
        values[column] = orjson.loads(values[column])
    values["errors"] = tuple(values["errors"])
    return BatchRecord(**values)
