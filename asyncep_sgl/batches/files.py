"""Files of the Batch API: uploads, and what batches wrote."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from asyncep_sgl.batches.database import Database, whole
from asyncep_sgl.batches.records import UNFINISHED, ApiError, FileRecord

IS_UNFINISHED = f"status IN ({', '.join(repr(status) for status in UNFINISHED)})"
"""SQL, of a batch."""


class FileStore:
    """The files of one folder. `open_store` makes it.

    Args:
        folder: where their contents lie.
        database: what is known of them.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, database: Database, clock: Callable[[], float]) -> None:
        self._folder, self._database, self._clock = folder, database, clock

    def path(self, file_id: str) -> Path:
        """Where a file's contents lie."""
        return self._folder / file_id

    async def add(self, purpose: str, filename: str, source: IO[bytes], seconds: int | None = None) -> FileRecord:
        """Keeps a copy of `source`, for so many seconds or for ever."""
        await self.sweep()
        file_id = f"file-{uuid.uuid4().hex}"
        size = await asyncio.to_thread(_copy, source, self.path(file_id))
        now = int(self._clock())
        record = FileRecord(file_id, purpose, filename, size, now, None if seconds is None else now + seconds)
        async with self._database.change():
            await self.enter(record)
        return record

    async def enter(self, file: FileRecord) -> None:
        """Inside a transaction: a file whose contents are in place is there from now on."""
        values = (file.id, file.purpose, file.filename, file.size, file.created_at, file.expires_at)
        await self._database.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", values)

    async def get(self, file_id: str) -> FileRecord:
        """A file's record.

        Raises:
            ApiError: 404; there is none, or it has expired.
        """
        rows = await self._database.rows("SELECT * FROM files WHERE id = ?", (file_id,))
        if not rows or (rows[0]["expires_at"] is not None and rows[0]["expires_at"] <= self._clock()):
            raise ApiError(404, f"no file {file_id!r}", param="file_id", code="not_found")
        return FileRecord(**dict(rows[0]))

    async def page(self, *, purpose: str | None, after: str | None, limit: int, newest: bool) -> list[FileRecord]:
        """Files in order of their making, those after the one named `after`."""
        await self.sweep()
        rows = await self._database.page("files", after=after, limit=limit, newest=newest, purpose=purpose)
        return [FileRecord(**dict(row)) for row in rows]

    async def delete(self, file_id: str) -> None:
        """Forgets a file.

        Raises:
            ApiError: 404; there is none. 409; an unfinished batch needs it.
        """
        await self.get(file_id)
        async with self._database.change():
            users = await self._database.select(
                f"SELECT id FROM batches WHERE input_file = ? AND {IS_UNFINISHED}", (file_id,)
            )
            if users:
                raise ApiError(409, f"{file_id} is being worked on by {users[0]['id']}; cancel that first")
            await self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.path(file_id).unlink(missing_ok=True)

    async def sweep(self) -> None:
        """Forgets files that have expired and that no unfinished batch needs."""
        query = f"""SELECT id FROM files WHERE expires_at <= ?
            AND id NOT IN (SELECT input_file FROM batches WHERE {IS_UNFINISHED})"""
        async with self._database.change():
            gone = [row["id"] for row in await self._database.select(query, (int(self._clock()),))]
            await self._database.execute_many("DELETE FROM files WHERE id = ?", [(one,) for one in gone])
        for one in gone:
            self.path(one).unlink(missing_ok=True)

    async def tidy(self) -> None:
        """Removes contents of an upload, or of a batch's end, that was cut short. Before anything else is done."""
        known = {row["id"] for row in await self._database.rows("SELECT id FROM files")}
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()


def _copy(source: IO[bytes], path: Path) -> int:
    with whole(path) as out:
        shutil.copyfileobj(source, out)
    return path.stat().st_size
