"""The Batch API's database, one transaction at a time, and files that are there whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import aiosqlite

from asyncep_sgl.errors import UsageError
from asyncep_sgl.front.batches.disk import Disk, NoSpace
from asyncep_sgl.front.batches.records import ApiError

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, purpose TEXT, filename TEXT, size INTEGER,
    created_at INTEGER, expires_at INTEGER)""",
    """CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, model TEXT, endpoint TEXT, input_file TEXT, window TEXT,
    status TEXT, created_at INTEGER, expires_at INTEGER, times TEXT, output_file TEXT, error_file TEXT, total INTEGER,
    completed INTEGER, failed INTEGER, errors TEXT, metadata TEXT, output_seconds INTEGER)""",
    """CREATE TABLE IF NOT EXISTS requests (batch TEXT, number INTEGER, custom_id TEXT, offset INTEGER, length INTEGER,
    PRIMARY KEY (batch, number)) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS answers (batch TEXT, number INTEGER, status INTEGER, body BLOB,
    PRIMARY KEY (batch, number))""",
)
# What each later version has added, in order; the number of the version is their count.
_ADDED = (
    (
        "ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE batches ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE batches ADD COLUMN quota INTEGER",
        "ALTER TABLE batches ADD COLUMN estimate INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE batches ADD COLUMN readings INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE batches ADD COLUMN quarantined INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN state INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX files_of_owner ON files (owner)",
        "CREATE INDEX batches_of_owner ON batches (owner, status)",
        "CREATE INDEX requests_under_way ON requests (batch, state) WHERE state > 0",
    ),
)
_LOG_BYTES = 16 << 20
# Free pages given back to the file system in one go, some 4 MB.
_PAGES = 1000


class Database:
    """``state.sqlite``. Its methods may be called together.

    Args:
        connection: to the database.
        disk: where it lies.
    """

    def __init__(self, connection: aiosqlite.Connection, disk: Disk) -> None:
        self._connection, self._disk = connection, disk
        # One connection has one transaction at a time, and nobody should see half of it.
        self._lock = asyncio.Lock()

    async def prepare(self) -> None:
        """Makes the tables where there are none, and adds what an older version's lack.

        Raises:
            DiskError: the file is none of SQLite's, or cannot be written.
            UsageError: a later version wrote it.
        """
        self._connection.row_factory = aiosqlite.Row
        with self._disk.errors():
            # Of a new file only: pages that are no longer used can be given back.
            await self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            await self._connection.execute("PRAGMA journal_mode = WAL")
            # Synchronised at each commit: what a client was told has happened.
            await self._connection.execute("PRAGMA synchronous = FULL")
            await self._connection.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
        async with self.change():
            [[version]] = await self.select("PRAGMA user_version")
            if version > len(_ADDED):
                raise UsageError("state.sqlite was written by a later version of AsyncEP; use that, or another folder")
            if version == len(_ADDED):
                # Nothing to write, which a full disk would not take.
                return
            for statement in (*_SCHEMA, *(one for added in _ADDED[version:] for one in added)):
                await self.execute(statement)
            await self.execute(f"PRAGMA user_version = {len(_ADDED)}")

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """A transaction: all of what is done inside, or nothing.

        Raises:
            DiskError: it could not be written; nothing of it is there.
        """
        async with self._lock:
            try:
                with self._disk.errors():
                    await self._connection.execute("BEGIN IMMEDIATE")
                    yield
                    await self._connection.execute("COMMIT")
            except BaseException:
                # Where the disk was full SQLite may have undone everything itself, and if the task was cancelled the
                # transaction may not have begun. In either case there must be none when the next one begins.
                with contextlib.suppress(sqlite3.Error):
                    await self._connection.execute("ROLLBACK")
                raise

    async def surely(self, work: Callable[[], Awaitable[None]]) -> None:
        """A transaction that has to succeed on a full disk too: the reserve is given up for it.

        Args:
            work: what is done inside; it may be done several times.
        """
        while True:
            try:
                async with self.change():
                    await work()
                return
            except NoSpace:
                # In pieces: others may be as quick as this to take what has become free.
                if not self._disk.release():
                    raise

    async def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds; not to be called inside a transaction."""
        async with self._lock:
            with self._disk.errors():
                return await self.select(query, values)

    async def shrink(self) -> None:
        """Gives pages that are no longer used back to the file system. A file of an older version cannot."""
        [[mode]] = await self.rows("PRAGMA auto_vacuum")
        freed = False
        while mode and (await self.rows("PRAGMA freelist_count"))[0][0] > _PAGES:
            await self.rows(f"PRAGMA incremental_vacuum({_PAGES})")
            freed = True
        if freed:
            # The file becomes shorter when the log is written back to it.
            await self.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    # Inside a transaction

    async def select(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds."""
        return list(await self._connection.execute_fetchall(query, values))

    async def execute(self, query: str, values: Sequence[Any] = ()) -> int:
        """Rows that a statement changed."""
        async with self._connection.execute(query, values) as cursor:
            return cursor.rowcount

    async def execute_many(self, query: str, rows: Sequence[Sequence[Any]]) -> None:
        """The same statement for many rows."""
        await self._connection.executemany(query, rows)

    async def insert(self, table: str, values: Mapping[str, Any]) -> None:
        """A row, by the names of its columns."""
        marks = ", ".join("?" * len(values))
        await self.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))

    # Lists

    async def page(
        self,
        table: str,
        *,
        owners: Sequence[str] | None,
        after: str | None,
        limit: int,
        newest: bool,
        purpose: str | None = None,
        unexpired: int | None = None,
    ) -> list[Any]:
        """Rows in order of their making, those after the one named `after`.

        Args:
            owners: whose rows; None means everybody's.
            unexpired: only those that have not expired at this time.

        Raises:
            ApiError: 400; `after` is not there.
        """
        where, values = ["1"], list[Any]()
        if owners is not None:
            where.append(f"owner IN ({', '.join('?' * len(owners))})")
            values.extend(owners)
        whose = list(where), list(values)
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        if unexpired is not None:
            where.append("(expires_at IS NULL OR expires_at > ?)")
            values.append(unexpired)
        if after is not None:
            query = f"SELECT rowid FROM {table} WHERE {' AND '.join(whose[0])} AND id = ?"
            place = await self.rows(query, (*whose[1], after))
            if not place:
                raise ApiError(400, f"after: {after[:100]!r} is not there", param="after")
            where.append(f"rowid {'<' if newest else '>'} ?")
            values.append(place[0][0])
        order = "DESC" if newest else "ASC"
        query = f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY rowid {order} LIMIT ?"
        return await self.rows(query, (*values, limit))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, under another name until it is on disk. Nothing of it stays if that fails."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with unfinished.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    synchronise(path.parent)


def synchronise(folder: Path) -> None:
    """A folder's entries are on disk when this returns."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
