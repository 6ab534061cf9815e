"""The Batch API's memory: a folder with a SQLite database and the files, whole after a kill at any point.

    state.sqlite   files, batches, and of unfinished batches each request's place and answer
    files/ID       the contents of a file; written under another name, synchronised, renamed, and then entered
    lock           held by the server that works on the folder
    ballast        space that is given up where a delete meets a full disk
    in-order       there after an end at which nothing was under way

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
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import aiosqlite
import orjson

from asyncep_router.keys import NOBODY, Caller
from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.batches.bounds import Bounds, Ledger, names_of
from asyncep_sgl.front.batches.database import Database, synchronise, whole
from asyncep_sgl.front.batches.disk import Disk, NoSpace
from asyncep_sgl.front.batches.files import IS_UNFINISHED, FileStore
from asyncep_sgl.front.batches.lines import Problem, RequestLine, answer_line, error_line
from asyncep_sgl.front.batches.records import UNFINISHED, ApiError, BatchRecord, FileRecord, Order, Status
from asyncep_sgl.front.batches.requests import NO_ANSWER, RequestStore

Final = Literal["completed", "failed", "expired", "cancelled"]
_WHY = {
    "expired": "not executed before the completion window ended",
    "cancelled": "not executed before the batch was cancelled",
}
_DAY = 86400


class BatchStore:
    """Use `open_store`. For one event loop; its methods may be called together."""

    def __init__(
        self, folder: Path, database: Database, disk: Disk, ledger: Ledger, clock: Callable[[], float]
    ) -> None:
        self.files = FileStore(folder / "files", database, disk, ledger, clock)
        self.requests = RequestStore(database)
        self.disk, self.ledger = disk, ledger
        self._database, self._clock = database, clock

    # Batches

    async def add_batch(self, order: Order, model: str, caller: Caller = NOBODY) -> BatchRecord:
        """A new batch of a caller's, to be validated.

        Raises:
            ApiError: 400; no such input file, or not one for batches. 429; the caller has too many.
        """
        try:
            # The administrator may use anybody's file; the batch is the administrator's.
            file = await self.files.get(order.input_file, names_of(caller))
        except ApiError as error:
            if error.status != 404:
                raise
            raise ApiError(400, f"input_file_id: {error.message}", param="input_file_id") from error
        if file.purpose != "batch":
            raise ApiError(
                400,
                f"input_file_id: {file.id} has the purpose {file.purpose!r}; upload it with 'batch'",
                param="input_file_id",
            )
        self.disk.need(0)
        now = int(self._clock())
        batch_id = f"batch_{uuid.uuid4().hex}"
        values = {
            "id": batch_id,
            "model": model_name(model),
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
            "owner": caller.name,
            "quota": caller.file_bytes,
        }
        async with self._database.change():
            await self._make_room(caller.name)
            await self._database.insert("batches", values)
        return await self.batch(batch_id)

    async def _make_room(self, owner: str) -> None:
        """Inside a transaction: an owner may have one more batch.

        Raises:
            ApiError: 429; too many are unfinished.
        """
        bounds = self.ledger.bounds
        [(unfinished,)] = await self._database.select(
            f"SELECT COUNT(*) FROM batches WHERE owner = ? AND {IS_UNFINISHED}", (owner,)
        )
        if unfinished >= bounds.unfinished:
            message = f"you have {unfinished} unfinished batches, the most there may be; wait for some or cancel them"
            raise ApiError(429, message, code="too_many_batches")
        await self._database.execute(
            f"""DELETE FROM batches WHERE id IN (SELECT id FROM batches WHERE owner = ? AND NOT {IS_UNFINISHED}
            ORDER BY rowid DESC LIMIT -1 OFFSET ?)""",
            (owner, max(0, bounds.batches - unfinished - 1)),
        )

    async def batch(self, batch_id: str, owners: Sequence[str] | None = None) -> BatchRecord:
        """A batch as it stands.

        Args:
            owners: whose batches are looked at; None means everybody's.

        Raises:
            ApiError: 404; there is none.
        """
        rows = await self._database.rows("SELECT * FROM batches WHERE id = ?", (batch_id,))
        if not rows or (owners is not None and rows[0]["owner"] not in owners):
            raise ApiError(404, f"no batch {batch_id[:100]!r}", param="batch_id", code="not_found")
        return _batch(rows[0])

    async def batches(self, *, owners: Sequence[str] | None = None, after: str | None, limit: int) -> list[BatchRecord]:
        """Batches, the newest first, those after the one named `after`."""
        rows = await self._database.page("batches", owners=owners, after=after, limit=limit, newest=True)
        return [_batch(row) for row in rows]

    async def unfinished(self) -> list[BatchRecord]:
        """What is to be done, of whatever model, the oldest first."""
        query = f"SELECT * FROM batches WHERE {IS_UNFINISHED} ORDER BY rowid"
        return [_batch(row) for row in await self._database.rows(query)]

    async def sweep(self) -> None:
        """Forgets what has had its time, and gives space back."""
        await self.files.sweep()
        if days := self.ledger.bounds.file_days:
            query = f"DELETE FROM batches WHERE NOT {IS_UNFINISHED} AND json_extract(times, '$.' || status) <= ?"

            async def forget() -> None:
                await self._database.execute(query, (int(self._clock()) - days * _DAY,))

            await self._database.surely(forget)
        await self._database.shrink()
        self.disk.restore()

    # A batch's life

    async def reading(self, batch_id: str) -> None:
        """Its input begins to be read."""
        async with self._database.change():
            await self._database.execute("UPDATE batches SET readings = readings + 1 WHERE id = ?", (batch_id,))

    async def read(self, batch_id: str, estimate: int, total: int) -> None:
        """Its input has been read.

        Args:
            estimate: bytes that its answers are expected to take.
            total: requests; 0 where the file is refused.
        """
        async with self._database.change():
            await self._database.execute(
                "UPDATE batches SET readings = 0, estimate = ?, total = ? WHERE id = ?", (estimate, total, batch_id)
            )

    async def accept(self, batch_id: str, requests: Sequence[RequestLine]) -> None:
        """The input file is good: its requests are to be done."""
        async with self._database.change():
            # Not if it was cancelled meanwhile.
            if await self._move(batch_id, "in_progress", ("validating",)):
                await self.requests.enter(batch_id, requests)

    async def cancel(self, batch_id: str, owners: Sequence[str] | None = None) -> BatchRecord:
        """Asks for a batch's end; asking again changes nothing. Works on a full disk.

        Raises:
            ApiError: 404; there is none. 409; it has ended.
        """
        await self.batch(batch_id, owners)

        async def move() -> None:
            await self._move(batch_id, "cancelling", ("validating", "in_progress"))

        await self._database.surely(move)
        batch = await self.batch(batch_id)
        if batch.status not in ("cancelling", "cancelled"):
            raise ApiError(409, f"{batch_id} is {batch.status} and can no longer be cancelled")
        return batch

    async def finalizing(self, batch_id: str) -> None:
        """Every request has its answer."""
        async with self._database.change():
            await self._move(batch_id, "finalizing", ("in_progress",))

    async def finish(self, batch_id: str, final: Final, problems: Sequence[Problem] = ()) -> None:
        """Writes a batch's files from its answers, and ends it; does nothing to one that has ended.

        Args:
            problems: why it has failed, or why none of its requests was begun.

        Raises:
            DiskError: the files could not be written; nothing of them is there, and another call tries again.
        """
        batch = await self.batch(batch_id)
        if batch.status not in UNFINISHED:
            return
        with self.disk.errors():
            paths = await self._write_files(batch, final, problems)
        now = int(self._clock())
        expires = self.ledger.bounds.expiry(now, batch.output_seconds)
        written = [
            (column, FileRecord(path.name, "batch_output", f"{batch_id}_{kind}.jsonl", size, now, expires, batch.owner))
            for path, column, kind in zip(paths, ("output_file", "error_file"), ("output", "error"), strict=True)
            if (size := path.stat().st_size)
        ]
        errors = orjson.dumps([problem.as_json() for problem in problems]).decode()

        async def enter() -> None:
            for column, file in written:
                await self.files.enter(file)
                await self._database.execute(f"UPDATE batches SET {column} = ? WHERE id = ?", (file.id, batch_id))
            # Requests without an answer have failed, too.
            await self._database.execute(
                "UPDATE batches SET failed = total - completed, errors = ? WHERE id = ?", (errors, batch_id)
            )
            await self._move(batch_id, final, UNFINISHED)
            await self.requests.forget(batch_id)

        try:
            await self._database.surely(enter)
        except NoSpace:
            # Nothing was entered, and the next try needs the space.
            for path in paths:
                path.unlink(missing_ok=True)
            raise
        for _, file in written:
            self.ledger.enter(file.owner, file.size)
        for path in paths:
            if path.name not in {file.id for _, file in written}:
                path.unlink(missing_ok=True)

    async def _write_files(self, batch: BatchRecord, final: Final, problems: Sequence[Problem]) -> tuple[Path, Path]:
        """Its answers, and the requests without a good one. Each is there whole or not at all."""
        output, errors = (
            self.files.path(f"file-{batch.id.removeprefix('batch_')}-{kind}") for kind in ("output", "error")
        )
        # A completed batch has an answer to each request.
        why = "expired" if final == "completed" else final
        code, message = f"batch_{why}", _WHY.get(why) or problems[0].message
        _, size = await self.requests.kept(batch.id)
        if size:
            # Answers are there twice until the database forgets them. One without any ends also where space is short.
            self.disk.need(size)
        try:
            with whole(output) as good, whole(errors) as bad:

                def write(rows: Sequence[Any]) -> None:
                    for row in rows:
                        number, name, status = row["number"], row["custom_id"], row["status"]
                        if status is None:
                            bad.write(error_line(batch.id, number, name, code, message))
                        elif status == NO_ANSWER:
                            bad.write(error_line(batch.id, number, name, **orjson.loads(row["body"])))
                        else:
                            line = answer_line(batch.id, number, name, status, row["body"])
                            (good if status == 200 else bad).write(line)

                # In threads: the server has others to answer meanwhile, and a disk may take its time.
                async for rows in self.requests.answered(batch.id):
                    await asyncio.to_thread(write, rows)
                for file in (good, bad):
                    file.flush()
                    await asyncio.to_thread(os.fsync, file.fileno())
        except BaseException:
            for path in (output, errors):
                path.unlink(missing_ok=True)
            raise
        return output, errors

    async def _move(self, batch_id: str, status: Status, out_of: Sequence[Status]) -> int:
        """How many batches were moved: 1, or 0 where it was in none of the states."""
        marks = ",".join("?" * len(out_of))
        return await self._database.execute(
            f"""UPDATE batches SET status = ?, times = json_set(times, ?, ?) WHERE id = ? AND status IN ({marks})""",
            (status, f"$.{status}", int(self._clock()), batch_id, *out_of),
        )


def model_name(model: str) -> str:
    """A model as a batch remembers it: a folder by its real path, however it is spelled; a hub's name as it is."""
    return os.path.realpath(model) if os.path.isdir(model) else model


@contextlib.asynccontextmanager
async def open_store(
    folder: Path, *, bounds: Bounds | None = None, clock: Callable[[], float] = time.time
) -> AsyncIterator[BatchStore]:
    """The store in a folder, made if need be and locked meanwhile.

    Args:
        bounds: what the operator allows.
        clock: seconds since 1970.

    Raises:
        UsageError: the folder cannot be used, or another server uses it.
        DiskError: it cannot be used as it stands, such as on a full disk.
    """
    bounds = bounds or Bounds()
    async with AsyncExitStack() as stack:
        try:
            (folder / "files").mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"--asyncep-batch-dir {folder}: another server uses it; give each its own") from None
        except OSError as error:
            raise UsageError(f"--asyncep-batch-dir {folder}: {error.strerror}; give a folder to write to") from error
        # What was cut short is in nobody's way, whatever state the rest is in.
        for path in (folder / "files").glob("*.tmp"):
            path.unlink(missing_ok=True)
        disk = Disk(folder, bounds.free_bytes)
        try:
            database = await _database(stack, folder, disk)
        except NoSpace:
            disk.release()
            database = await _database(stack, folder, disk)
        ledger = Ledger.of(
            bounds,
            {
                owner: (files, size)
                for owner, files, size in await database.rows("SELECT owner, COUNT(*), SUM(size) FROM files GROUP BY 1")
            },
        )
        store = BatchStore(folder, database, disk, ledger, clock)
        with disk.errors():
            await store.files.tidy()
            mark = folder / _IN_ORDER
            await store.requests.read_marks(mark.exists())
            if mark.exists():
                # Before anything is sent: the next end may be another one.
                mark.unlink()
                synchronise(folder)
            disk.restore()
        yield store


_IN_ORDER = "in-order"


def end_in_order(folder: Path) -> None:
    """Notes that no request is under way and none will be begun: what is marked so is no suspect."""
    with contextlib.suppress(OSError):
        (folder / _IN_ORDER).touch()


async def _database(stack: AsyncExitStack, folder: Path, disk: Disk) -> Database:
    with disk.errors():
        connection = await stack.enter_async_context(aiosqlite.connect(folder / "state.sqlite", isolation_level=None))
    database = Database(connection, disk)
    await database.prepare()
    return database


def _batch(row: Any) -> BatchRecord:
    values = dict(row)
    for column in ("times", "errors", "metadata"):
        values[column] = orjson.loads(values[column])
    values["errors"] = tuple(values["errors"])
    return BatchRecord(**values)
