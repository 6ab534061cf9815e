"""Files of the Batch API: uploads, and what batches wrote."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from asyncep_router.keys import Caller
from asyncep_sgl.front.batches.bounds import Ledger
from asyncep_sgl.front.batches.database import Database, synchronise
from asyncep_sgl.front.batches.disk import Disk, NoSpace
from asyncep_sgl.front.batches.records import MOST_FILE_BYTES, NEED_INPUT, UNFINISHED, ApiError, FileRecord

IS_UNFINISHED = f"status IN ({', '.join(repr(status) for status in UNFINISHED)})"
"""SQL, of a batch."""
_NEEDS_INPUT = f"status IN ({', '.join(repr(status) for status in NEED_INPUT)})"
# So much of an upload is kept in memory between two writes.
_PIECE = 1 << 18


class FileStore:
    """The files of one folder. `open_store` makes it.

    Args:
        folder: where their contents lie.
        database: what is known of them.
        disk: the file system they lie in.
        ledger: who uses how much.
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path, database: Database, disk: Disk, ledger: Ledger, clock: Callable[[], float]
    ) -> None:
        self._folder, self._database, self._clock = folder, database, clock
        self.disk, self.ledger = disk, ledger

    def path(self, file_id: str) -> Path:
        """Where a file's contents lie."""
        return self._folder / file_id

    async def upload(self, caller: Caller) -> Upload:
        """A file that a caller sends piece by piece. To be used in ``async with``."""
        await self.sweep()
        return Upload(self, caller)

    async def keep(self, upload: Upload, filename: str, seconds: int | None) -> FileRecord:
        """Enters an upload whose contents are in place."""
        now = int(self._clock())
        expires = self.ledger.bounds.expiry(now, seconds)
        record = FileRecord(upload.id, "batch", filename, upload.size, now, expires, upload.caller.name)
        async with self._database.change():
            await self.enter(record)
        return record

    async def enter(self, file: FileRecord) -> None:
        """Inside a transaction: a file whose contents are in place is there from now on."""
        await self._database.insert("files", vars(file))

    async def get(self, file_id: str, owners: Sequence[str] | None = None) -> FileRecord:
        """A file's record.

        Args:
            owners: whose files are looked at; None means everybody's.

        Raises:
            ApiError: 404; there is none, or it has expired.
        """
        rows = await self._database.rows("SELECT * FROM files WHERE id = ?", (file_id,))
        file = FileRecord(**dict(rows[0])) if rows else None
        unseen = file is None or (owners is not None and file.owner not in owners)
        if file is None or unseen or (file.expires_at is not None and file.expires_at <= self._clock()):
            raise ApiError(404, f"no file {file_id[:100]!r}", param="file_id", code="not_found")
        return file

    async def size(self, file_id: str) -> int | None:
        """Bytes of a file that a batch works on, expired or not; None where there is none."""
        rows = await self._database.rows("SELECT size FROM files WHERE id = ?", (file_id,))
        return rows[0]["size"] if rows else None

    async def page(
        self, *, owners: Sequence[str] | None = None, purpose: str | None, after: str | None, limit: int, newest: bool
    ) -> list[FileRecord]:
        """Files in order of their making, those after the one named `after`. Works on a full disk."""
        rows = await self._database.page(
            "files",
            owners=owners,
            after=after,
            limit=limit,
            newest=newest,
            purpose=purpose,
            unexpired=int(self._clock()),
        )
        return [FileRecord(**dict(row)) for row in rows]

    # Forgetting

    async def delete(self, file_id: str, owners: Sequence[str] | None = None) -> None:
        """Forgets a file. Works on a full disk.

        Raises:
            ApiError: 404; there is none. 409; an unfinished batch needs it.
        """
        file = await self.get(file_id, owners)
        users, gone = f"SELECT id FROM batches WHERE input_file = ? AND {_NEEDS_INPUT}", 0

        def refuse(users: Sequence[Any]) -> None:
            if users:
                raise ApiError(409, f"{file_id} is being worked on by {users[0]['id']}; cancel that first")

        # Before its contents may go.
        refuse(await self._database.rows(users, (file_id,)))

        async def forget() -> None:
            nonlocal gone
            refuse(await self._database.select(users, (file_id,)))
            gone = await self._database.execute("DELETE FROM files WHERE id = ?", (file_id,))

        await self._surely([file_id], forget)
        if gone:
            self.ledger.give(file.owner, file.size, files=1)
        with self.disk.errors():
            self.path(file_id).unlink(missing_ok=True)
            self.disk.restore()

    async def sweep(self) -> None:
        """Forgets files that have expired and that no unfinished batch needs. Works on a full disk."""
        query = f"""SELECT id, owner, size FROM files WHERE expires_at <= ?
            AND id NOT IN (SELECT input_file FROM batches WHERE {_NEEDS_INPUT})"""
        now = int(self._clock())
        if not (old := {one["id"] for one in await self._database.rows(query, (now,))}):
            return
        gone = list[Any]()

        async def forget() -> None:
            # Nobody can use a file that has expired, so that only these, or fewer of them, are found again.
            gone[:] = [one for one in await self._database.select(query, (now,)) if one["id"] in old]
            await self._database.execute_many("DELETE FROM files WHERE id = ?", [(one["id"],) for one in gone])

        await self._surely(old, forget)
        for one in gone:
            self.ledger.give(one["owner"], one["size"], files=1)
        with self.disk.errors():
            for one in gone:
                self.path(one["id"]).unlink(missing_ok=True)

    async def _surely(self, going: Collection[str], forget: Callable[[], Awaitable[None]]) -> None:
        """Forgets files for certain: where not even the reserve was there, the space of their contents is."""
        try:
            await self._database.surely(forget)
        except NoSpace:
            for file_id in going:
                self.path(file_id).unlink(missing_ok=True)
            await self._database.surely(forget)

    async def tidy(self) -> None:
        """Removes contents of an upload, or of a batch's end, that was cut short. Before anything else is done.

        Files of an earlier version, which kept them for ever, get the term that files have now.
        """
        known = {row["id"] for row in await self._database.rows("SELECT id FROM files")}
        for path in self._folder.iterdir():
            if path.name not in known and path.is_file():
                path.unlink()
        if (expires := self.ledger.bounds.expiry(int(self._clock()), None)) is not None:
            query = "UPDATE files SET expires_at = ? WHERE expires_at IS NULL"
            if await self._database.rows("SELECT 1 FROM files WHERE expires_at IS NULL LIMIT 1"):
                async with self._database.change():
                    await self._database.execute(query, (expires,))


class Upload:
    """A file that is being sent. Its bytes count from the moment they come; leaving it without `keep` undoes all."""

    def __init__(self, files: FileStore, caller: Caller) -> None:
        self.id, self.size, self.caller = f"file-{uuid.uuid4().hex}", 0, caller
        self._files, self._piece, self._kept = files, bytearray(), False
        self._path = files.path(self.id)
        self._unfinished = self._path.with_name(self._path.name + ".tmp")
        self._out: IO[bytes] | None = None

    async def __aenter__(self) -> Upload:
        self._files.ledger.admit(self.caller)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._out is not None:
            self._out.close()
        if not self._kept:
            for path in (self._unfinished, self._path):
                path.unlink(missing_ok=True)
            self._files.ledger.give(self.caller.name, self.size, files=1)

    def expect(self, size: int) -> None:
        """So many bytes will come at least.

        Raises:
            ApiError: 413; they are more than the caller's or the server's quota.
        """
        if size > 0:
            self._files.ledger.take(self.caller, size)
            self._files.ledger.give(self.caller.name, size)

    async def write(self, data: bytes) -> None:
        """The next bytes.

        Raises:
            ApiError: 413; too large, or more than the caller's or the server's quota. 507; the disk is full.
        """
        if self.size + len(data) > MOST_FILE_BYTES:
            raise too_large()
        self._files.ledger.take(self.caller, len(data))
        self.size += len(data)
        self._piece += data
        if len(self._piece) >= _PIECE:
            await self._flush()

    async def keep(self, filename: str, seconds: int | None = None) -> FileRecord:
        """The file is whole; it is on disk when this returns.

        Args:
            seconds: how long it is kept; None is as long as any.
        """
        await self._flush()
        with self._files.disk.errors():
            await asyncio.to_thread(self._synchronise)
        record = await self._files.keep(self, filename, seconds)
        self._kept = True
        return record

    async def _flush(self) -> None:
        piece, self._piece = self._piece, bytearray()
        # What running batches will write is as good as written.
        self._files.disk.need(self._files.ledger.promised + len(piece))
        with self._files.disk.errors():
            await asyncio.to_thread(self._write, bytes(piece))

    def _write(self, piece: bytes) -> None:
        if self._out is None:
            # Without a buffer, so that closing it has nothing left to write.
            self._out = self._unfinished.open("wb", buffering=0)
        left = memoryview(piece)
        while left:
            left = left[self._out.write(left) :]

    def _synchronise(self) -> None:
        assert self._out is not None
        os.fsync(self._out.fileno())
        self._unfinished.replace(self._path)
        synchronise(self._path.parent)


def too_large() -> ApiError:
    """A file is larger than any may be."""
    return ApiError(413, f"file: larger than {MOST_FILE_BYTES // 10**6} MB; send it as several", param="file")
