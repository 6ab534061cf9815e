"""Sends hostile cases, many at once, judges what comes back, and finds out which one a process died of."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hostile.cases import Case
from hostile.oracle import Outcome, kind_of, verdict
from hostile.shrink import curl, smallest
from hostile.wire import send

# What is sent once more after a death, one at a time, because it was there when it happened.
_MOST_SUSPECTS = 48
_LOOK_SECONDS = 0.5
_DEATH_SHOWS_SECONDS = 2.0
# Requests whose answer came so shortly before a death was seen may have been its cause.
_RECENT_SECONDS = 3.0
# What is in flight gets so long to end before suspects are asked, and so long they are asked.
_DRAIN_SECONDS, _ASK_SECONDS = 60.0, 60.0
_MOST_FINDINGS = 200
_PROGRESS_SECONDS = 10.0
# A field of which so many values have killed is known well enough.
_ENOUGH_VALUES = 3
_SHRUNK_SECONDS = 20.0
_DIED = "a process died of it"
_LATE = "no answer in time"


class Target(Protocol):
    """What is attacked."""

    urls: Sequence[str]
    key: str
    secrets: Sequence[str]

    def processes(self) -> dict[str, int]:
        """Process ids by role; empty where the server has ended."""
        ...

    async def revive(self) -> None:
        """Returns once every process is there again and serves, having started the server anew if it ended."""
        ...


class Cases(Protocol):
    """Where cases come from; they never end."""

    async def next(self) -> Case: ...


@dataclass
class Finding:
    """A kind of fault, the first case that showed it, and how often it was seen."""

    wrong: str
    case: Case
    url: str
    answer: str
    count: int = 1
    shrunk: Case | None = None

    def record(self) -> dict[str, Any]:
        case = self.shrunk or self.case
        return {
            "wrong": self.wrong,
            "route": f"{case.method} {case.path}",
            "fields": [f"{name}={value[:80]}" for name, value in self.case.changed],
            "count": self.count,
            "answer": self.answer,
            "smallest": self.shrunk is not None,
            "command": curl(case, self.url)[:4000],
        }


@dataclass
class Score:
    """What an attack came to."""

    sent: int = 0
    skipped: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    deaths: int = 0
    ends: int = 0
    beside_deaths: int = 0
    findings: dict[str, Finding] = field(default_factory=dict)

    def line(self) -> str:
        return f"{self.sent} sent, {len(self.findings)} findings, {self.deaths} deaths, {dict(self.statuses)}"


class Attack:
    """Workers that send what ``feed`` yields; while a death is looked into, they wait."""

    def __init__(self, target: Target, feed: Cases, *, in_flight: int, most_ends: int) -> None:
        self.score = Score()
        self._target, self._feed = target, feed
        self._in_flight, self._most_ends = in_flight, most_ends
        self._open = asyncio.Event()
        self._open.set()
        self._done = False
        # Connections that were closed: of a process that died, or the answer to that very case.
        self._alarm = asyncio.Event()
        self._cut: list[tuple[Case, Outcome, str]] = []
        self._late: list[tuple[float, Case, Outcome, str]] = []
        self._deaths: list[float] = []
        self._flying: dict[int, Case] = {}
        self._recent: deque[tuple[float, Case, str | None]] = deque(maxlen=4 * in_flight)
        self._deadly: dict[str, set[str]] = {}
        self._deadly_together: list[frozenset[tuple[str, str]]] = []

    async def run(self, *, seconds: float, requests: int) -> None:
        """Until the time is over or so many have been sent, whichever is first."""
        deadline = time.monotonic() + seconds
        known = await asyncio.to_thread(self._target.processes)
        workers = [asyncio.create_task(self._work(requests)) for _ in range(self._in_flight)]
        said = time.monotonic()
        try:
            while not self._done and time.monotonic() < deadline:
                await self._look_time()
                self._done = self._done or all(worker.done() for worker in workers)
                now = await asyncio.to_thread(self._target.processes)
                if time.monotonic() > said + _PROGRESS_SECONDS:
                    said = time.monotonic()
                    print(self.score.line(), file=sys.stderr, flush=True)
                if now != known:
                    await self._look_into(known, now)
                    known = await asyncio.to_thread(self._target.processes)
                elif self._cut:
                    for case, outcome, url in self._cut:
                        self._find(case, f"no answer: {outcome.error}", outcome, url)
                self._cut.clear()
                self._open.set()
        finally:
            self._done = True
            self._open.set()
            for result in await asyncio.gather(*workers, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
            self._sort_late()

    async def shrink(self, seconds: float) -> None:
        """Looks for each finding's smallest case, as far as the time goes; those of deaths last, each costs a start."""
        deadline = time.monotonic() + seconds
        for finding in sorted(self.score.findings.values(), key=lambda finding: _kills(finding.wrong)):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            if finding.wrong == _LATE:
                continue

            async def still(case: Case, finding: Finding = finding) -> bool:
                if _kills(finding.wrong):
                    return await self._kills_alone(case)
                outcome = await send(finding.url, case, self._target.key)
                return verdict(case, outcome, self._target.secrets) == finding.wrong

            try:
                async with asyncio.timeout(min(left, _SHRUNK_SECONDS)):
                    # First as it is: what came of company is not shrunk.
                    if await still(finding.case):
                        finding.shrunk = finding.case
                        tries = 12 if _kills(finding.wrong) else 80
                        finding.shrunk = await smallest(finding.case, still, tries)
            except TimeoutError:
                continue
            finally:
                if not await asyncio.to_thread(self._target.processes):
                    await self._target.revive()

    async def _look_time(self) -> None:
        """Returns when processes are to be looked at: every so often, and a moment after a connection was closed."""
        alarm = asyncio.create_task(self._alarm.wait())
        await asyncio.wait([alarm], timeout=_LOOK_SECONDS)
        if alarm.done():
            self._alarm.clear()
            # Of a process that has just died not everybody knows.
            await asyncio.sleep(_LOOK_SECONDS)
        alarm.cancel()

    async def _work(self, requests: int) -> None:
        while True:
            await self._open.wait()
            if self._done or self.score.sent >= requests:
                return
            case = await self._feed.next()
            if self._known_deadly(case):
                self.score.skipped += 1
                continue
            number = self.score.sent
            self.score.sent += 1
            url = self._target.urls[number % len(self._target.urls)]
            self._flying[number] = case
            outcome = await send(url, case, self._target.key)
            del self._flying[number]
            self._judge(case, outcome, url)

    def _judge(self, case: Case, outcome: Outcome, url: str) -> None:
        wrong = verdict(case, outcome, self._target.secrets)
        if outcome.error != "ConnectionRefusedError":
            self._recent.append((time.monotonic(), case, wrong))
        self.score.statuses[str(outcome.status or outcome.error or case.manner)] += 1
        self.score.slowest = max(self.score.slowest, outcome.seconds)
        if wrong is None:
            return
        # While a process is away others' requests are cut off too: nobody sends before that has been looked at.
        if wrong.startswith("no answer: "):
            self._cut.append((case, outcome, url))
            self._open.clear()
            self._alarm.set()
            return
        if wrong == _LATE:
            self._late.append((time.monotonic(), case, outcome, url))
            return
        if _kills(wrong):
            self._remember(case)
        self._find(case, wrong, outcome, url)

    def _find(self, case: Case, wrong: str, outcome: Outcome, url: str) -> None:
        kind = kind_of(case, wrong, outcome)
        if kind in self.score.findings:
            self.score.findings[kind].count += 1
        elif len(self.score.findings) < _MOST_FINDINGS:
            answer = f"{outcome.status or outcome.error} {outcome.body[:400].decode(errors='replace')}"
            self.score.findings[kind] = Finding(wrong, case, url, answer)

    def _sort_late(self) -> None:
        """Tells what was late because a process died meanwhile from what was late by itself."""
        for at, case, outcome, url in self._late:
            if any(at - outcome.seconds - _RECENT_SECONDS <= death <= at + _RECENT_SECONDS for death in self._deaths):
                self.score.beside_deaths += 1
            else:
                self._find(case, _LATE, outcome, url)
        self._late.clear()

    async def _look_into(self, before: dict[str, int], now: dict[str, int]) -> None:
        """A process has died: lets what is in flight end, then sends each suspect by itself."""
        gone = sorted(name for name, pid in before.items() if now.get(name) != pid)
        self.score.deaths += len(gone) if now else 1
        self.score.ends += not now
        self._deaths.append(time.monotonic())
        self._open.clear()
        ended_now = time.monotonic()
        suspects = list(self._flying.values())
        recent = [(at, case, wrong) for at, case, wrong in self._recent if at > ended_now - _RECENT_SECONDS]
        # An answer says so itself: nobody else need be asked.
        named = any(wrong is not None and _kills(wrong) for _, _, wrong in recent)
        suspects += [case for _, case, wrong in recent if wrong is not None]
        suspects += [case for _, case, wrong in recent if wrong is None]
        while self._flying and time.monotonic() < ended_now + _DRAIN_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
        await self._target.revive()
        found = named
        asked_until = time.monotonic() + _ASK_SECONDS
        for case in [] if named else suspects[:_MOST_SUSPECTS]:
            if time.monotonic() > asked_until:
                break
            if await self._kills_alone(case):
                self._remember(case)
                answer = Outcome(None, error=f"{_DIED}: {', '.join(gone)}")
                self._find(case, _DIED, answer, self._target.urls[0])
                found = True
                break
        if not found:
            nobody = Case("?", "?", None, (("suspects", str(len(suspects))),))
            self._find(nobody, "a death whose cause was not found", Outcome(None, error=", ".join(gone)), "")
        if self.score.ends >= self._most_ends:
            self._done = True
        self._open.set()

    async def _kills_alone(self, case: Case) -> bool:
        """Sends a case by itself and says whether a process was gone afterwards; all are there again on return."""
        before = await asyncio.to_thread(self._target.processes)
        outcome = await send(self._target.urls[0], case, self._target.key)
        suspicious = verdict(case, outcome) is not None or case.manner != "whole"
        deadline = time.monotonic() + (_DEATH_SHOWS_SECONDS if suspicious else 0.2)
        while True:
            if await asyncio.to_thread(self._target.processes) != before:
                await self._target.revive()
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.1)

    def _remember(self, case: Case) -> None:
        changes = frozenset((name.split(".")[-1], value) for name, value in case.changed)
        if len(changes) == 1:
            ((name, value),) = changes
            self._deadly.setdefault(name, set()).add(value)
        else:
            self._deadly_together.append(changes)

    def _known_deadly(self, case: Case) -> bool:
        """Whether a case has in it what has already killed: once is enough to know it."""
        changes = {(name.split(".")[-1], value) for name, value in case.changed}
        single = any(
            value in self._deadly.get(name, ()) or len(self._deadly.get(name, ())) >= _ENOUGH_VALUES
            for name, value in changes
        )
        return single or any(together and together <= changes for together in self._deadly_together)


def _kills(wrong: str) -> bool:
    return " died of it" in wrong
