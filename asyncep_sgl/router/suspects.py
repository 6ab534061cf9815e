"""Deaths of ranks and the requests that were there: between the policy, the quarantine and those who wait for answers.

No sockets and no processes: the controller says what happens, this says what is to be sent and answers what is not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncep_router.errors import DuplicateRequestError, UnknownRankError
from asyncep_sgl.process.restarts import RankDeaths
from asyncep_sgl.router.quarantine import Quarantine, Remembered

if TYPE_CHECKING:
    from asyncep_router.messages import Dispatch, Request
    from asyncep_router.routing_policy import RoutingPolicy

logger = logging.getLogger(__name__)

QUARANTINED = "this request was on a rank both times it died; quarantined: it is not computed again"
# A request whose client has gone may still be computed: it counts as there for so many batches more.
_BATCHES_AFTER_ABORT = 3
_MOST_ABANDONED = 1024


@dataclass
class _Abandoned:
    request: Request
    rank: int
    batches: int = _BATCHES_AFTER_ABORT


@dataclass
class Suspects:
    """Keeps a deadly request from killing twice as many ranks as it must, and from ending the server.

    Attributes:
        policy: of the router.
        answer: ends a request with a message and an HTTP status.
        fingerprint: of a request's payload.
        deaths: which count against the server.
    """

    policy: RoutingPolicy
    answer: Callable[[str, str, int], None]
    fingerprint: Callable[[Any], bytes]
    deaths: RankDeaths = field(default_factory=RankDeaths)
    quarantine: Quarantine = field(default_factory=Quarantine)
    remembered: Remembered = field(default_factory=Remembered)
    condemned: int = 0
    _computing: dict[int, dict[int, tuple[str, ...]]] = field(default_factory=dict)
    _abandoned: dict[str, _Abandoned] = field(default_factory=dict)
    _reserved: int | None = None

    # What ranks do

    def batch_started(self, rank: int, batch: int, rids: tuple[str, ...]) -> None:
        """A rank begins to compute a batch."""
        self._computing.setdefault(rank, {})[batch] = rids

    def batch_finished(self, rank: int, batch: int, rids: Iterable[str]) -> None:
        """A rank has computed a batch, with which ``rids`` are finished."""
        self.deaths.computed(rank)
        begun = self._computing.get(rank, {})
        for number in [number for number in begun if number <= batch]:
            del begun[number]
        for rid in rids:
            self.quarantine.forget(rid)
            self._abandoned.pop(rid, None)
        for rid, left in list(self._abandoned.items()) if self._abandoned else ():
            left.batches -= left.rank == rank
            if not left.batches:
                del self._abandoned[rid]
                self.quarantine.forget(rid)

    def rank_died(self, rank: int, now: float) -> int:
        """A rank has ended: what it had waits again, suspects apart. Returns how many requests it had."""
        number = self.deaths.died(rank, now)
        begun = self._computing.pop(rank, {})
        computing = {rid for rids in begun.values() for rid in rids}
        requests = {request.rid: request for request in self.policy.rank_died(rank)}
        requests.update(self._recalled(rank, computing, now))
        pinned = {rid: request.pinned for rid, request in requests.items() if request.pinned is not None}
        death = self.quarantine.rank_died(rank, list(requests), computing, pinned, number, now)
        for rid in death.suspects:
            self.policy.set_aside(rid)
        if death.condemned is not None:
            self.deaths.explained(number)
            self._condemn(requests[death.condemned], now)
        elif death.suspects:
            logger.warning("rank %d died with %d requests that are tried alone", rank, len(death.suspects))
        if self._reserved == rank:
            self._reserved = None
        return len(requests)

    def stopped_rank_died(self, rank: int, now: float) -> int:
        """A rank has been ended that somebody had stopped: what it had waits again. Returns how many requests."""
        self.deaths.died(rank, now)
        self._computing.pop(rank, None)
        requests = self.policy.rank_died(rank)
        tried = self.quarantine.rank_was_stopped(rank)
        if tried is not None and not self.policy.set_aside(tried):
            self.quarantine.forget(tried)
        if self._reserved == rank:
            self._reserved = None
        return len(requests)

    def rank_ended_starting(self, rank: int, now: float) -> None:
        """A rank has died before it took any request."""
        self._computing.pop(rank, None)
        self.deaths.died(rank, now)

    # What clients do

    def refused(self, req: Any, now: float) -> bool:
        """Whether a request that comes is known to be deadly; it is answered then."""
        if not self.remembered or not self.remembered.knows(self.fingerprint(req), now):
            return False
        self.answer(req.rid, QUARANTINED, 500)
        return True

    def abort(self, rid: str, everything: bool) -> tuple[list[str], bool]:
        """Clients want some requests no more.

        Args:
            rid: ids that begin so.
            everything: all of them.

        Returns:
            Those that were waiting, which nobody has answered, and whether the ranks are to be told.
        """
        withdrawn = [request.rid for request in self.policy.abort(rid, prefix=True, everything=everything)]
        for name in withdrawn:
            self.quarantine.forget(name)
        flying = self.policy.in_flight(rid, everything=everything)
        trial = self.quarantine.trial
        if trial is not None and trial[0] in flying and not everything:
            # Its answer goes to nobody, but whether it is deadly is worth knowing, and it is under way.
            flying.remove(trial[0])
            if not flying:
                return withdrawn, False
        for name in flying:
            rank, request = self.policy.where(name), self.policy.request(name)
            # A rank drops it without a word, or finishes it all the same; neither is charged any longer.
            self.policy.abandon(name)
            if everything:
                self.quarantine.forget(name)
            if rank is not None and request is not None and len(self._abandoned) < _MOST_ABANDONED:
                self._abandoned[name] = _Abandoned(request, rank)
        return withdrawn, True

    # What is to be done

    def step(self, alive: Iterable[int], now: float) -> list[Dispatch]:
        """Suspects that are to be sent now, and which rank is kept free for them. To be called before the policy."""
        if not self.quarantine.waiting and self._reserved is None:
            return []
        loads = {rank: len(self.policy.requests_in_flight(rank)) for rank in alive}
        step = self.quarantine.step(loads, self.policy.pending > 0, now)
        if step.reserved != self._reserved:
            if self._reserved in loads:
                self.policy.set_accepting(self._reserved, True)
            if step.reserved is not None:
                self.policy.set_accepting(step.reserved, False)
            self._reserved = step.reserved
        if step.trial is None or step.reserved is None:
            return []
        dispatch = self.policy.send_alone(step.trial, step.reserved, now)
        if dispatch is None:
            self.quarantine.forget(step.trial)
            return []
        return [dispatch]

    def next_wakeup(self, now: float) -> float | None:
        """When `step` could have something to say without any event before."""
        return self.quarantine.next_wakeup(now)

    def _recalled(self, rank: int, computing: set[str], now: float) -> dict[str, Request]:
        """Requests whose clients have gone but which the rank may have died of: they wait again, to be tried."""
        found = {}
        gone = {rid: left.request for rid, left in self._abandoned.items() if left.rank == rank}
        for rid, request in gone.items():
            del self._abandoned[rid]
            if computing and rid not in computing:
                continue
            try:
                self.policy.submit(request, now)
            except (DuplicateRequestError, UnknownRankError):
                continue
            found[rid] = request
        return found

    def _condemn(self, request: Request, now: float) -> None:
        """A request has killed twice: it is answered, and all that are the same with it."""
        earlier = self.quarantine.condemn(request.rid)
        if earlier is not None:
            self.deaths.explained(earlier)
        mark = self.fingerprint(request.payload)
        self.remembered.add(mark, now)
        for other in self.policy.requests_waiting():
            same = other is request or (
                other.token_ids == request.token_ids and self.fingerprint(other.payload) == mark
            )
            if same:
                self.policy.abort(other.rid)
                self.quarantine.forget(other.rid)
                self.condemned += 1
                logger.error("request %s: %s", other.rid, QUARANTINED)
                self.answer(other.rid, QUARANTINED, 500)
