"""The Batch API's database, one transaction at a time, and files that are there whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import aiosqlite

from asyncep_sgl.batches.records import ApiError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, purpose TEXT, filename TEXT, size INTEGER, created_at INTEGER,
    expires_at INTEGER);
CREATE TABLE IF NOT EXISTS batches (id TEXT PRIMARY KEY, model TEXT, endpoint TEXT, input_file TEXT, window TEXT,
    status TEXT, created_at INTEGER, expires_at INTEGER, times TEXT, output_file TEXT, error_file TEXT, total INTEGER,
    completed INTEGER, failed INTEGER, errors TEXT, metadata TEXT, output_seconds INTEGER);
CREATE TABLE IF NOT EXISTS requests (batch TEXT, number INTEGER, custom_id TEXT, offset INTEGER, length INTEGER,
    PRIMARY KEY (batch, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answers (batch TEXT, number INTEGER, status INTEGER, body BLOB,
    PRIMARY KEY (batch, number));
"""


class Database:
    """``state.sqlite``. Its methods may be called together."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection
        # One connection has one transaction at a time, and nobody should see half of it.
        self._lock = asyncio.Lock()

    async def prepare(self) -> None:
        """Makes the tables where there are none.

        Raises:
            aiosqlite.DatabaseError: the file is none of SQLite's.
        """
        self._connection.row_factory = aiosqlite.Row
        # Synchronised at each commit: what a client was told has happened.
        await self._connection.executescript(f"PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; {_SCHEMA}")

    @contextlib.asynccontextmanager
    async def change(self) -> AsyncIterator[None]:
        """A transaction: all of what is done inside, or nothing."""
        async with self._lock:
            await self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                await self._connection.execute("ROLLBACK")
                raise
            await self._connection.execute("COMMIT")

    async def rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What a query finds; not to be called inside a transaction."""
        async with self._lock:
            return await self.select(query, values)

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
        self, table: str, *, after: str | None, limit: int, newest: bool, purpose: str | None = None
    ) -> list[Any]:
        """Rows in order of their making, those after the one named `after`.

        Raises:
            ApiError: 400; `after` is not there.
        """
        where, values = ["1"], list[Any]()
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        if after is not None:
            place = await self.rows(f"SELECT rowid FROM {table} WHERE id = ?", (after,))
            if not place:
                raise ApiError(400, f"after: {after!r} is not there", param="after")
            where.append(f"rowid {'<' if newest else '>'} ?")
            values.append(place[0][0])
        order = "DESC" if newest else "ASC"
        query = f"SELECT * FROM {table} WHERE {' AND '.join(where)} ORDER BY rowid {order} LIMIT ?"
        return await self.rows(query, (*values, limit))


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, under another name until it is on disk."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as out:
        yield out
        out.flush()
        os.fsync(out.fileno())
    unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
