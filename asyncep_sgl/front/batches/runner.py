"""Works off batches: a bounded number of requests at a time, sent through the server's own routes.

Requests go through the whole application as a client's would, so that checks, errors and answers are the same. What is
different: they are marked as `in_batch`, by which they get a lower priority in the router, they are sent in the name of
the batch's owner, and at most so many are under way. A request that came at a bad moment (503, 429) is tried again
until its batch expires. What a full disk does not take is tried again until it does. A batch of another model waits for
a server of that model, and ends here with its window or when it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import IO, TypeVar

import orjson

from asyncep_router.keys import Caller
from asyncep_router.rates import Rates
from asyncep_sgl.front.batches.bounds import Promise
from asyncep_sgl.front.batches.disk import DiskError, NoSpace
from asyncep_sgl.front.batches.estimates import prompts
from asyncep_sgl.front.batches.inputs import FileChanged, open_input, read_body, read_input, unreadable
from asyncep_sgl.front.batches.lines import Problem, RequestLine
from asyncep_sgl.front.batches.records import NEED_INPUT, BatchRecord
from asyncep_sgl.front.batches.requests import Answer
from asyncep_sgl.front.batches.store import BatchStore, Final, model_name
from asyncep_sgl.front.batches.turns import Turns
from asyncep_sgl.front.batches.work import Answers, Work
from asyncep_sgl.front.passage import caller, in_batch

logger = logging.getLogger("asyncep")

Send = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Posts a JSON body to a path; gives status and body of the answer."""

_KEEP_SECONDS = 0.5
# Requests marked as under way in one transaction. All that are marked are suspects if the server ends.
_PAGE = 64
_TRY_AGAIN = (429, 503)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
# At least so often it is looked whether there is space for what waits for it.
_LOOK_SECONDS = 3.0
_ANOTHER_MODEL = "waits for a server of its model on this folder; the one that runs serves another"
_UNBEGUN = "none of its requests was begun"
# A server error may be a rank's death; but the same request must not bring down one after the other.
_MOST_SERVER_ERRORS = 3
# Batches of one owner that are worked on at a time; files read at a time.
_MOST_ACTIVE, _MOST_READING = 8, 2
# Ends of the server that a batch may be the reason of: while its file is read, and while one of its lines is alone.
_MOST_READINGS, MOST_QUARANTINED = 3, 10
# Times that a batch is begun again after an error that nobody foresaw.
_MOST_ERRORS = 3
_T = TypeVar("_T")


def _nobody_known(_name: str) -> Caller | None:
    return None


class BatchRunner:
    """The batches of one store.

    Args:
        model: what is served.
        send: answers a request.
        most: requests under way at a time, of all batches together.
        clock: seconds since 1970.
        caller_named: who has a key of this name; None where nobody does.
        rates: prompts of the lines that are sent.
    """

    def __init__(
        self,
        store: BatchStore,
        model: str,
        send: Send,
        *,
        most: int,
        clock: Callable[[], float] = time.time,
        caller_named: Callable[[str], Caller | None] = _nobody_known,
        rates: Rates | None = None,
    ) -> None:
        self._store, self._model, self._send, self._clock = store, model_name(model), send, clock
        self._caller_named, self._rates = caller_named, rates or Rates()
        self._turns = Turns(most)
        self._reading = asyncio.Semaphore(_MOST_READING)
        self._active: Counter[str] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._works: dict[str, Work] = {}
        self._closing = False

    async def resume(self) -> None:
        """Goes on with everything that is unfinished."""
        for batch in await self._store.unfinished():
            self.begin(batch)

    def begin(self, batch: BatchRecord) -> None:
        """Works on a batch, if nobody does so yet."""
        if batch.id not in self._tasks and not self._closing:
            # A key that is gone leaves its owner's batches what it allowed when they were created.
            owner = self._caller_named(batch.owner) or Caller(batch.owner, file_bytes=batch.quota)
            foreign = model_name(batch.model) != self._model
            work = self._works[batch.id] = Work(batch.id, owner, foreign)
            work.going.set()
            timer = asyncio.get_running_loop().call_later(max(0.0, batch.expires_at - self._clock()), self._stop, work)
            task = self._tasks[batch.id] = asyncio.create_task(self._run(work))
            task.add_done_callback(lambda _: self._forget(work, timer))

    def cancel(self, batch_id: str) -> None:
        """No further request of this batch; those under way are finished."""
        if (work := self._works.get(batch_id)) is not None:
            self._stop(work)

    def waits(self, batch_id: str) -> str | None:
        """Why a batch does not go on at the moment."""
        work = self._works.get(batch_id)
        return work.waits if work is not None else None

    def look_again(self) -> None:
        """There may be space now for what waits for it."""
        for work in self._works.values():
            work.wake.set()

    async def close(self) -> None:
        """Stops working; what is unfinished stays so."""
        self._closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stop(self, work: Work) -> None:
        work.end.set()
        work.wake.set()

    def _forget(self, work: Work, timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        del self._tasks[work.id], self._works[work.id]
        self._store.ledger.settle(work.id)
        self.look_again()

    # One batch

    async def _run(self, work: Work) -> None:
        # For all that this task and those it makes send.
        in_batch.set(True)
        caller.set(work.caller)
        if work.foreign:
            return await self._patient(work)
        while self._active[work.owner] >= _MOST_ACTIVE and not work.end.is_set():
            await work.pause(_LONGEST_PAUSE)
        self._active[work.owner] += 1
        try:
            await self._patient(work)
        finally:
            self._active[work.owner] -= 1

    async def _patient(self, work: Work) -> None:
        """Tries until the batch has ended."""
        pause, errors = _FIRST_PAUSE, 0
        while True:
            try:
                if errors < _MOST_ERRORS:
                    await self._batch(work)
                else:
                    why = "the server failed on this batch several times; its log says how"
                    await self._store.finish(work.id, "failed", [Problem("internal_error", why)])
                return
            except DiskError as error:
                self._wait_for(work, error)
            except Exception:
                errors += 1
                logger.exception("%s: an error that was not foreseen", work.id)
                if errors > _MOST_ERRORS:
                    # Not even its end could be written down; the next start of the server tries again.
                    return
            await work.pause(pause)
            pause = min(2 * pause, _LOOK_SECONDS)

    def _wait_for(self, work: Work, error: DiskError) -> None:
        if work.waits is None:
            logger.warning("%s waits: %s", work.id, error.message)
        work.waits = f"waits for space: {error.message}" if isinstance(error, NoSpace) else error.message

    async def _surely(self, work: Work, change: Callable[[], Awaitable[_T]]) -> _T:
        """Does something to the state, again and again where the disk does not take it."""
        pause = _FIRST_PAUSE
        while True:
            try:
                done = await change()
            except DiskError as error:
                if self._closing:
                    raise
                self._wait_for(work, error)
                work.going.clear()
                await work.pause(pause)
                pause = min(2 * pause, _LOOK_SECONDS)
            else:
                if not work.going.is_set():
                    work.going.set()
                    work.waits = None
                    work.wake.set()
                return done

    async def _batch(self, work: Work) -> None:
        batch = await self._store.batch(work.id)
        if work.foreign and batch.status in NEED_INPUT:
            await self._wait_for_its_model(work, batch)
        elif batch.status == "validating":
            await self._begin(work, batch)
        batch = await self._store.batch(work.id)
        if "in_progress" not in batch.times:
            return await self._end_unbegun(work, batch)
        self._store.ledger.promise(work.id, Answers(batch, *await self._store.requests.kept(work.id)).promise())
        work.waits = None
        if batch.status == "finalizing":
            return await self._store.finish(work.id, "completed")
        # It may have been cancelled meanwhile.
        if batch.status == "in_progress" and not work.foreign:
            await self._requests(work, batch)
        final: Final = "expired"
        if not await self._store.requests.unanswered(work.id):
            await self._store.finalizing(work.id)
            final = "completed"
        if await self._cancelled(work):
            final = "cancelled"
        elif work.problem is not None:
            return await self._store.finish(work.id, "failed", [work.problem])
        await self._store.finish(work.id, final)

    async def _wait_for_its_model(self, work: Work, batch: BatchRecord) -> None:
        """Returns when the batch is to end, here or with this server."""
        if batch.status == "in_progress":
            # What it has will be written whatever happens.
            size = Answers(batch, *await self._store.requests.kept(work.id)).promise().finish
            self._store.ledger.promise(work.id, Promise(batch.owner, size, size, size))
        while not (work.end.is_set() or self._closing or await self._cancelled(work)):
            work.waits = _ANOTHER_MODEL
            await work.pause(_LONGEST_PAUSE)

    async def _cancelled(self, work: Work) -> bool:
        return (await self._store.batch(work.id)).status == "cancelling"

    async def _end_unbegun(self, work: Work, batch: BatchRecord) -> None:
        """Ends a batch none of whose requests was begun; its errors say why."""
        if batch.status == "cancelling":
            await self._store.finish(work.id, "cancelled", [Problem("batch_cancelled", f"cancelled; {_UNBEGUN}")])
        elif work.problems:
            await self._store.finish(work.id, "failed", work.problems)
        else:
            why = f": {work.waits}" if work.waits is not None else ""
            problem = Problem("batch_expired", f"the completion window ended and {_UNBEGUN}{why}")
            await self._store.finish(work.id, "expired", [problem])

    # Its file

    async def _begin(self, work: Work, batch: BatchRecord) -> None:
        """Reads the input file and accepts its requests once there is space for their answers, unless it ends first."""
        ledger = self._store.ledger
        ledger.settle(work.id)
        if batch.readings >= _MOST_READINGS and not work.reading:
            why = f"quarantined: the server ended each of the {batch.readings} times that it read this file"
            work.problems = [Problem("quarantined", why)]
            return
        size = await self._store.files.size(batch.input_file)
        async with self._reading:
            if not work.reading:
                await self._store.reading(work.id)
                # Noted once: another try of this process is no end of the server.
                work.reading = True
            requests: list[RequestLine] = []
            try:
                path = self._store.files.path(batch.input_file)
                requests, work.problems = await asyncio.to_thread(read_input, path, size, batch.endpoint)
            except (OSError, FileChanged) as error:
                work.problems = [unreadable(error)]
            estimate, total = sum(request.estimate for request in requests), len(requests)
            await self._store.read(work.id, estimate, 0 if work.problems else total)
            work.reading = False
        if work.problems:
            return
        promise = Promise.of(batch.owner, estimate, total, 0, 0)
        if (why_never := ledger.never(work.caller, promise, size or 0)) is not None:
            work.problems = [Problem("quota_exceeded", why_never)]
            return
        while (why_not := ledger.hold(work.caller, promise, self._store.disk.room())) is not None:
            work.waits = why_not
            if work.end.is_set() or self._closing or await self._cancelled(work):
                return
            await work.pause(_LOOK_SECONDS)
        ledger.promise(work.id, promise)
        await self._store.accept(work.id, requests)

    # Its requests

    async def _requests(self, work: Work, batch: BatchRecord) -> None:
        """Does requests until there are no more, the batch ends, or its file can no longer be read."""
        store = self._store
        # What an earlier try of this process had under way no longer is.
        await store.requests.release(work.id)
        if batch.quarantined > MOST_QUARANTINED:
            why = f"quarantined: the server ended during {batch.quarantined} of its requests, each of them alone"
            work.problem = Problem("quarantined", why)
            return
        try:
            file = open_input(store.files.path(batch.input_file), await store.files.size(batch.input_file))
        except (OSError, FileChanged) as error:
            work.problem = unreadable(error)
            return
        with file:
            await self._suspects(work, batch, file)
            await self._together(work, batch, file)

    async def _together(self, work: Work, batch: BatchRecord, file: IO[bytes]) -> None:
        """Sends those of which nothing bad is known, many at a time."""
        answers = Answers(batch, *await self._store.requests.kept(work.id))
        queue: asyncio.Queue[Answer | None] = asyncio.Queue()
        writer = asyncio.create_task(self._keep(work, answers, queue))
        page: list[RequestLine] = []
        try:
            async with asyncio.TaskGroup() as group:
                while not writer.done() and await self._may_go_on(work, answers):
                    if not page and not (page := await self._surely(work, self._take(work))):
                        break
                    await self._turns.enter(work.owner, work.id)
                    if work.stopped or not work.going.is_set():
                        self._turns.leave(work.owner, work.id)
                        continue
                    line = page.pop(0)
                    await self._charge(work, batch, line, file)
                    group.create_task(self._request(work, batch, line, file, queue))
        finally:
            queue.put_nowait(None)
            await writer

    def _take(self, work: Work) -> Callable[[], Awaitable[list[RequestLine]]]:
        # What is taken is marked as under way: of a slow owner no more than what a second allows.
        rate = work.caller.prompts_per_second
        most = _PAGE if rate is None else max(1, min(_PAGE, int(rate)))
        return lambda: self._store.requests.take(work.id, most)

    async def _charge(self, work: Work, batch: BatchRecord, line: RequestLine, file: IO[bytes]) -> None:
        """Counts a line's prompts towards its owner's rate, before it is sent. Its errors are those of the request."""
        if work.caller.prompts_per_second is None:
            return
        with contextlib.suppress(OSError, ValueError):
            body = orjson.loads(await asyncio.to_thread(read_body, file, line))
            self._rates.charge(work.caller, prompts(batch.endpoint, body) if isinstance(body, dict) else 1)

    async def _may_by_rate(self, work: Work) -> bool:
        """Waits until the owner's rate allows a request; False if the batch is to end meanwhile."""
        while not work.stopped and (seconds := self._rates.debt_seconds(work.caller)) > 0:
            work.waits = "waits for the rate of its owner's key (prompts_per_second)"
            await work.pause(min(seconds, _LOOK_SECONDS))
        return not work.stopped

    async def _may_go_on(self, work: Work, answers: Answers) -> bool:
        """Whether more requests are to be sent; waits until there is space for their answers."""
        ledger, disk = self._store.ledger, self._store.disk
        while await self._may_by_rate(work):
            promise = answers.promise()
            ledger.promise(work.id, promise)
            # Every batch can always end with the answers that it has.
            left = max(1, answers.batch.total - answers.number)
            page = 2 * (promise.files - promise.finish) * min(_PAGE, left) // left
            full = ledger.full(work.caller, page // 2)
            try:
                disk.need(ledger.to_finish + page)
            except NoSpace as error:
                self._wait_for(work, error)
            else:
                if full is None and work.going.is_set():
                    work.waits = None
                    return True
                work.waits = full or work.waits
            await work.pause(_LOOK_SECONDS)
        return False

    async def _request(
        self, work: Work, batch: BatchRecord, line: RequestLine, file: IO[bytes], queue: asyncio.Queue[Answer | None]
    ) -> None:
        try:
            body = await asyncio.to_thread(read_body, file, line)
            status, answer = await self._patiently(batch.endpoint, body, work.end)
            if status is not None:
                queue.put_nowait((line.number, status, answer))
        except (OSError, ValueError) as error:
            work.problem = unreadable(error, line)
            work.wake.set()
        finally:
            self._turns.leave(work.owner, work.id)

    async def _suspects(self, work: Work, batch: BatchRecord, file: IO[bytes]) -> None:
        """Sends those during which the server ended once more, each alone."""
        pause, errors = _FIRST_PAUSE, Counter[int]()
        while await self._may_by_rate(work) and (lines := await self._store.requests.suspects(work.id, 1)):
            [line] = lines
            try:
                body = await asyncio.to_thread(read_body, file, line)
            except (OSError, ValueError) as error:
                work.problem = unreadable(error, line)
                return
            await self._turns.enter(work.owner, work.id, alone=True)
            try:
                if work.end.is_set():
                    return
                await self._charge(work, batch, line, file)
                await self._store.requests.mark_alone(work.id, line.number, True)
                status, answer = await self._answer(batch.endpoint, body)
                errors[line.number] += _is_error(status)
                if _is_final(status, answer, errors[line.number]):
                    # Kept before anything else is sent: an end after it is not this request's.
                    await self._store.requests.keep(work.id, [(line.number, status, answer)])
                    pause = _FIRST_PAUSE
                    continue
                await self._store.requests.mark_alone(work.id, line.number, False)
            finally:
                self._turns.leave(work.owner, work.id)
            await work.pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _patiently(self, path: str, body: bytes, end: asyncio.Event) -> tuple[int | None, bytes]:
        """The answer of a request; status None if the batch ended before there was one."""
        pause, errors = _FIRST_PAUSE, 0
        while True:
            status, answer = await self._answer(path, body)
            errors += _is_error(status)
            if _is_final(status, answer, errors):
                return status, answer
            try:
                await asyncio.wait_for(end.wait(), pause)
            except TimeoutError:
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                return None, b""

    async def _answer(self, path: str, body: bytes) -> tuple[int, bytes]:
        try:
            return await self._send(path, body)
        except Exception:
            logger.exception("a batch's request to %s", path)
            return 500, orjson.dumps({"error": {"message": "the server failed on this request", "code": 500}})

    async def _keep(self, work: Work, answers: Answers, queue: asyncio.Queue[Answer | None]) -> None:
        """Keeps answers in few transactions, each at most half a second after it came."""
        last = False
        while not last:
            found = [await queue.get()]
            if found[0] is not None:
                await asyncio.sleep(_KEEP_SECONDS)
            while not queue.empty():
                found.append(queue.get_nowait())
            last = None in found
            some = [answer for answer in found if answer is not None]
            size = sum(len(body) for _, _, body in some)

            async def keep(some: list[Answer] = some, size: int = size) -> None:
                self._store.disk.need(size)
                await self._store.requests.keep(work.id, some)

            if some:
                await self._surely(work, keep)
            answers.number += len(some)
            answers.size += size


def _is_error(status: int) -> bool:
    return status >= 500 and status not in _TRY_AGAIN


def _is_final(status: int, answer: bytes, errors: int) -> bool:
    """Whether a request is not tried again.

    Args:
        status, answer: the last ones.
        errors: answers so far that were the server's errors.
    """
    if status in _TRY_AGAIN:
        return False
    return not _is_error(status) or errors >= _MOST_SERVER_ERRORS or b"quarantined" in answer
