"""Works off batches: a bounded number of requests at a time, sent through the server's own routes.

Requests go through the whole application as a client's would, so that checks, errors and answers are the same. What is
different: they are marked as `in_batch`, by which they get a lower priority in the router, and at most so many are
under way. A request that came at a bad moment (503, 429) is tried again until its batch expires.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import IO

import orjson

from asyncep_sgl.batches.lines import RequestLine, body_of, read_lines
from asyncep_sgl.batches.mark import in_batch
from asyncep_sgl.batches.records import BatchRecord
from asyncep_sgl.batches.store import Answer, BatchStore, Final

logger = logging.getLogger("asyncep")

Send = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Posts a JSON body to a path; gives status and body of the answer."""

_KEEP_SECONDS = 0.5
_PAGE = 256
_TRY_AGAIN = (429, 503)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
# A server error may be a rank's death; but the same request must not bring down one after the other.
_MOST_SERVER_ERRORS = 3


class BatchRunner:
    """The batches of one store and model.

    Args:
        send: answers a request.
        most: requests under way at a time, of all batches together.
        clock: seconds since 1970.
    """

    def __init__(
        self, store: BatchStore, model: str, send: Send, *, most: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._store, self._model, self._send, self._clock = store, model, send, clock
        # Waiters get a place in the order they asked, so that batches take turns.
        self._places = asyncio.Semaphore(most)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def resume(self) -> None:
        """Goes on with everything that is unfinished."""
        for batch in await self._store.unfinished(self._model):
            self.begin(batch)

    def begin(self, batch: BatchRecord) -> None:
        """Works on a batch, if nobody does so yet."""
        if batch.id not in self._tasks:
            self._ends[batch.id] = asyncio.Event()
            task = self._tasks[batch.id] = asyncio.create_task(self._run(batch.id))
            task.add_done_callback(lambda _: self._forget(batch.id))

    def cancel(self, batch_id: str) -> None:
        """No further request of this batch; those under way are finished."""
        if (end := self._ends.get(batch_id)) is not None:
            end.set()

    async def close(self) -> None:
        """Stops working; what is unfinished stays so."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, batch_id: str) -> None:
        del self._tasks[batch_id], self._ends[batch_id]

    async def _run(self, batch_id: str) -> None:
        try:
            await self._batch(await self._store.batch(batch_id))
        except Exception:
            # Such as a full disk: the next start of the server goes on with it.
            logger.exception("%s stands still until the server is started again", batch_id)

    async def _batch(self, batch: BatchRecord) -> None:
        if batch.status == "validating":
            with self._store.files.path(batch.input_file).open("rb") as lines:
                requests, problems = await asyncio.to_thread(read_lines, lines, batch.endpoint)
            if problems:
                return await self._store.refuse(batch.id, problems)
            await self._store.accept(batch.id, requests)
        elif batch.status == "finalizing":
            return await self._store.finish(batch.id, "completed")
        # It may have been cancelled meanwhile.
        if (await self._store.batch(batch.id)).status == "in_progress":
            end = self._ends[batch.id]
            timer = asyncio.get_running_loop().call_later(max(0.0, batch.expires_at - self._clock()), end.set)
            try:
                await self._requests(batch, end)
            finally:
                timer.cancel()
        if await self._store.waiting(batch.id, 0, 1):
            cancelled = (await self._store.batch(batch.id)).status == "cancelling"
            final: Final = "cancelled" if cancelled else "expired"
        else:
            await self._store.finalizing(batch.id)
            cancelled = (await self._store.batch(batch.id)).status == "cancelling"
            final = "cancelled" if cancelled else "completed"
        await self._store.finish(batch.id, final)

    async def _requests(self, batch: BatchRecord, end: asyncio.Event) -> None:
        """Does requests until there are no more, or `end` is set."""
        answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        writer = asyncio.create_task(self._keep(batch.id, answers))
        after = 0
        try:
            with self._store.files.path(batch.input_file).open("rb") as file:
                async with asyncio.TaskGroup() as group:
                    while not end.is_set() and (page := await self._store.waiting(batch.id, after, _PAGE)):
                        after = page[-1].number
                        for line in page:
                            await self._places.acquire()
                            if end.is_set() or writer.done():
                                self._places.release()
                                break
                            group.create_task(self._request(batch, line, file, answers, end))
                        if writer.done():
                            break
        finally:
            answers.put_nowait(None)
            await writer

    async def _request(
        self,
        batch: BatchRecord,
        line: RequestLine,
        file: IO[bytes],
        answers: asyncio.Queue[Answer | None],
        end: asyncio.Event,
    ) -> None:
        in_batch.set(True)
        try:
            file.seek(line.offset)
            body = body_of(file.read(line.length))
            status, answer = await self._patiently(batch.endpoint, body, end)
            if status is not None:
                answers.put_nowait((line.number, status, answer))
        finally:
            self._places.release()

    async def _patiently(self, path: str, body: dict[str, object], end: asyncio.Event) -> tuple[int | None, bytes]:
        """The answer of a request; status None if the batch ended before there was one."""
        content, pause, errors = orjson.dumps(body), _FIRST_PAUSE, 0
        while True:
            status, answer = await self._send(path, content)
            errors += status >= 500 and status not in _TRY_AGAIN
            if status < 500 and status not in _TRY_AGAIN:
                return status, answer
            if errors >= _MOST_SERVER_ERRORS:
                return status, answer
            try:
                await asyncio.wait_for(end.wait(), pause)
            except TimeoutError:
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return None, b""

    async def _keep(self, batch_id: str, answers: asyncio.Queue[Answer | None]) -> None:
        """Keeps answers in few transactions, each at most half a second after it came."""
        last = False
        while not last:
            some = [await answers.get()]
            if some[0] is not None:
                await asyncio.sleep(_KEEP_SECONDS)
            while not answers.empty():
                some.append(answers.get_nowait())
            last = None in some
            await self._store.keep(batch_id, [answer for answer in some if answer is not None])
