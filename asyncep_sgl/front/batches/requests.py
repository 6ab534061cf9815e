"""The requests of unfinished batches: which wait, which are under way, which have their answer.

What is sent is marked before. A mark that is still there when the folder is opened again tells that the server ended
while the request was under way, so that the request may be why: it is a suspect, which is sent once more, with no other
request of a batch beside it. If the server ends again while it is under way, it is not sent a third time.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import orjson

from asyncep_sgl.front.batches.database import Database
from asyncep_sgl.front.batches.lines import RequestLine

Answer = tuple[int, int, bytes]
"""Line of the request, HTTP status, body. With the status `NO_ANSWER` the body is an error of ours, in JSON."""
NO_ANSWER = 0
_WAITING, _UNDER_WAY, _SUSPECT, _ALONE = range(4)
_PAGE = 100
# What is in one page at most, as long as one request is in it.
_PAGE_BYTES = 32 << 20
_UNANSWERED = "NOT EXISTS (SELECT 1 FROM answers AS a WHERE a.batch = requests.batch AND a.number = requests.number)"

_QUARANTINED = {
    "code": "quarantined",
    "message": "quarantined: the server ended twice while this request was under way, the second time with no other "
    "request of a batch beside it; it is not sent again",
}


class RequestStore:
    """Requests and answers in one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read_marks(self, ended_in_order: bool) -> None:
        """What marks of an earlier server mean. Before anything else is done.

        Args:
            ended_in_order: nothing was under way when it ended.
        """

        async def read() -> None:
            if ended_in_order:
                await self._unmark("1")
                await self._database.execute("UPDATE batches SET readings = 0 WHERE readings > 0")
                return
            found = await self._database.select(
                f"SELECT batch, number FROM requests WHERE state = {_ALONE} AND {_UNANSWERED}"
            )
            for batch, number in found:
                await self._keep(batch, [(number, NO_ANSWER, orjson.dumps(_QUARANTINED))])
                await self._database.execute("UPDATE batches SET quarantined = quarantined + 1 WHERE id = ?", (batch,))
            await self._database.execute(f"UPDATE requests SET state = {_SUSPECT} WHERE state = {_UNDER_WAY}")

        await self._database.surely(read)

    async def enter(self, batch_id: str, requests: Sequence[RequestLine]) -> None:
        """Inside a transaction: the requests of a batch, all of them waiting."""
        await self._database.execute_many(
            "INSERT INTO requests (batch, number, custom_id, offset, length) VALUES (?, ?, ?, ?, ?)",
            [(batch_id, r.number, r.custom_id, r.offset, r.length) for r in requests],
        )

    async def release(self, batch_id: str) -> None:
        """Nothing of this batch is under way."""
        async with self._database.change():
            await self._unmark("batch = ?", batch_id)

    async def take(self, batch_id: str, limit: int) -> list[RequestLine]:
        """The next requests that wait; marked as under way."""
        query = f"""SELECT number, custom_id, offset, length FROM requests
            WHERE batch = ? AND state = {_WAITING} AND {_UNANSWERED} ORDER BY number LIMIT ?"""
        async with self._database.change():
            rows = await self._database.select(query, (batch_id, limit))
            await self._database.execute_many(
                f"UPDATE requests SET state = {_UNDER_WAY} WHERE batch = ? AND number = ?",
                [(batch_id, row["number"]) for row in rows],
            )
        return [RequestLine(*row) for row in rows]

    async def suspects(self, batch_id: str, limit: int) -> list[RequestLine]:
        """Requests during which the server ended."""
        query = f"""SELECT number, custom_id, offset, length FROM requests
            WHERE batch = ? AND state = {_SUSPECT} AND {_UNANSWERED} ORDER BY number LIMIT ?"""
        return [RequestLine(*row) for row in await self._database.rows(query, (batch_id, limit))]

    async def mark_alone(self, batch_id: str, number: int, alone: bool) -> None:
        """A suspect is under way by itself, or no longer is."""
        async with self._database.change():
            await self._database.execute(
                "UPDATE requests SET state = ? WHERE batch = ? AND number = ?",
                (_ALONE if alone else _SUSPECT, batch_id, number),
            )

    async def keep(self, batch_id: str, answers: Iterable[Answer]) -> None:
        """Keeps answers; one for a request that has one is dropped."""
        async with self._database.change():
            await self._keep(batch_id, answers)

    async def unanswered(self, batch_id: str) -> bool:
        """Whether a request has no answer."""
        query = f"SELECT 1 FROM requests WHERE batch = ? AND {_UNANSWERED} LIMIT 1"
        return bool(await self._database.rows(query, (batch_id,)))

    async def kept(self, batch_id: str) -> tuple[int, int]:
        """Number and bytes of a batch's answers."""
        query = "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM answers WHERE batch = ?"
        [(number, size)] = await self._database.rows(query, (batch_id,))
        return number, size

    async def answered(self, batch_id: str) -> AsyncIterator[Sequence[Any]]:
        """Every request in the order of the file, with the status and body of its answer where it has one."""
        sizes = """SELECT r.number, COALESCE(LENGTH(a.body), 0) FROM requests AS r LEFT JOIN answers AS a
            ON a.batch = r.batch AND a.number = r.number
            WHERE r.batch = ? AND r.number > ? ORDER BY r.number LIMIT ?"""
        query = """SELECT r.number, r.custom_id, a.status, a.body FROM requests AS r LEFT JOIN answers AS a
            ON a.batch = r.batch AND a.number = r.number
            WHERE r.batch = ? AND r.number > ? AND r.number <= ? ORDER BY r.number"""
        after = 0
        while found := await self._database.rows(sizes, (batch_id, after, _PAGE)):
            last, size = found[0]
            for number, more in found[1:]:
                if (size := size + more) > _PAGE_BYTES:
                    break
                last = number
            yield await self._database.rows(query, (batch_id, after, last))
            after = last

    async def forget(self, batch_id: str) -> None:
        """Inside a transaction: the batch has ended."""
        for table in ("requests", "answers"):
            await self._database.execute(f"DELETE FROM {table} WHERE batch = ?", (batch_id,))

    async def _unmark(self, where: str, *values: str) -> None:
        for marked, before in ((_UNDER_WAY, _WAITING), (_ALONE, _SUSPECT)):
            await self._database.execute(
                f"UPDATE requests SET state = {before} WHERE state = {marked} AND {where}", values
            )

    async def _keep(self, batch_id: str, answers: Iterable[Answer]) -> None:
        counts = {"completed": 0, "failed": 0}
        for number, status, body in answers:
            counts["completed" if status == 200 else "failed"] += await self._database.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", (batch_id, number, status, body)
            )
        await self._database.execute(
            "UPDATE batches SET completed = completed + ?, failed = failed + ? WHERE id = ?",
            (counts["completed"], counts["failed"], batch_id),
        )
