"""Questions to all ranks, answered within seconds by those that are there.

SGLang sends a question to every rank and waits for as many answers as it once had ranks, without end; whoever asks the
same afterwards waits behind. A rank that is being started again never answers, and one that computes a long prompt does
so when it is done. Here a question counts the ranks that are there, has a time limit, and knows its own answers: one
that comes late is not taken for that of the next question.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import fastapi
from sglang.srt.managers.io_struct import BaseReq, GetHiCacheL3LayoutReq, GetInternalStateReq, ProfileReq

logger = logging.getLogger(__name__)

# Who only reads is content with what is known; whoever changes something has to hear from every rank.
_READING = (GetInternalStateReq, GetHiCacheL3LayoutReq)
READING_SECONDS = 3.0
CHANGING_SECONDS = 10.0
# The end of a profile writes it to disk.
PROFILING_SECONDS = 60.0
_LOOK_SECONDS = 0.5


class RankThere(NamedTuple):
    """A rank that takes part now, and how often it was started again: one that came back knows no older question."""

    rank: int
    restarts: int


RanksThere = Callable[[], set[RankThere] | None]
_ranks_there: list[RanksThere] = []


def ask_who_is_there(ranks_there: RanksThere) -> None:
    """Sets how this process learns which ranks are there; None as an answer: unknown.

    It is called in a thread and may block for a moment. Without it every rank is expected.
    """
    _ranks_there[:] = [ranks_there]


@dataclass
class _Question:
    tag: str | None = None
    answers: list[Any] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Desk:
    """What is kept for one of SGLang's communicators, which is one kind of question."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    question: _Question | None = None
    shared: asyncio.Task[list[Any]] | None = None
    known: list[Any] = field(default_factory=list)


async def call(communicator: Any, obj: Any) -> list[Any]:
    """In the place of ``FanOutCommunicator.__call__``: asks all ranks, returns the answers.

    Raises:
        fastapi.HTTPException: 503, if something was to be changed and not every rank that is there has said that it is.
    """
    desk = _desk(communicator)
    if not isinstance(obj, _READING):
        return await _ask_in_turn(communicator, desk, obj)
    # Those who read at the same time read the same.
    if desk.shared is None or desk.shared.done():
        desk.shared = asyncio.create_task(_ask_in_turn(communicator, desk, obj))
    return list(await asyncio.shield(desk.shared))


def handle_recv(communicator: Any, recv_obj: Any) -> None:
    """In the place of ``FanOutCommunicator.handle_recv``: takes an answer to the question that is open."""
    question = _desk(communicator).question
    tag = getattr(recv_obj, "http_worker_ipc", None)
    if question is None or (question.tag is not None and tag is not None and tag != question.tag):
        logger.debug("an answer that nobody waits for any more: %s", type(recv_obj).__name__)
        return
    question.answers.append(recv_obj)
    question.changed.set()


async def around_open_session(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A session that no rank opens is refused in the end."""
    try:
        return await asyncio.wait_for(original(*args, **kwargs), CHANGING_SECONDS)
    except TimeoutError:
        raise _unavailable(f"no rank has opened the session within {CHANGING_SECONDS:.0f} s") from None


def _desk(communicator: Any) -> _Desk:
    desk = communicator.__dict__.get("_asyncep_desk")
    if desk is None:
        desk = communicator._asyncep_desk = _Desk()
    return desk  # type: ignore[no-any-return]


async def _ask_in_turn(communicator: Any, desk: _Desk, obj: Any) -> list[Any]:
    reads = isinstance(obj, _READING)
    limit = READING_SECONDS if reads else PROFILING_SECONDS if isinstance(obj, ProfileReq) else CHANGING_SECONDS
    # A flush may be asked to wait for the ranks.
    limit += float(getattr(obj, "timeout_s", None) or 0.0)
    try:
        await asyncio.wait_for(desk.lock.acquire(), limit)
    except TimeoutError:
        raise _unavailable(f"the same has been asked before and is not answered after {limit:.0f} s") from None
    try:
        return await _ask(communicator, desk, obj, limit, reads)
    finally:
        desk.question = None
        desk.lock.release()


async def _ask(communicator: Any, desk: _Desk, obj: Any, limit: float, reads: bool) -> list[Any]:
    there = await _there()
    if there is not None and not there:
        if reads:
            return list(desk.known)
        raise _unavailable("no rank is there; they are being started again")
    question = desk.question = _Question()
    if isinstance(obj, BaseReq):
        # Ranks copy this into their answers, to say which of several tokenizers had asked.
        obj.http_worker_ipc = f"asyncep-question-{uuid.uuid4().hex}"
    if obj is not None:
        communicator._send(obj)
    # With several tokenizers it is their name now: answers find their way, and may be late ones.
    question.tag = getattr(obj, "http_worker_ipc", None)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    while True:
        expected = communicator._fan_out if there is None else len(there)
        if len(question.answers) >= expected:
            break
        left = deadline - loop.time()
        if left <= 0:
            break
        question.changed.clear()
        try:
            await asyncio.wait_for(question.changed.wait(), min(_LOOK_SECONDS, left))
        except TimeoutError:
            still = await _there()
            # Those that have gone since are not waited for; those that have come were not asked.
            there = there if there is None or still is None else there & still
    if len(question.answers) >= expected and question.answers:
        desk.known = list(question.answers)
    elif not reads:
        raise _unavailable(f"{len(question.answers)} of {expected} ranks have answered within {limit:.0f} s")
    elif not question.answers:
        return list(desk.known)
    return question.answers


async def _there() -> set[RankThere] | None:
    if not _ranks_there:
        return None
    return await asyncio.to_thread(_ranks_there[0])


def _unavailable(reason: str) -> fastapi.HTTPException:
    return fastapi.HTTPException(status_code=503, detail=reason, headers={"retry-after": "2"})
