"""Our policy: which request goes to which rank, and when. Events in, instructions out.

Pure and deterministic: no clock, no socket, no randomness. Feed it `submit`, `report`, `rank_joined`,
`rank_died`, `apply_event` and the like; call `poll` after each, send what it returns, and call it again
at `next_wakeup` if nothing happens before.

`rules.py` decides between ranks and in which order waiting requests of a queue are served, `fairness.py` which
queue a request waits in and whose turn it is. Before they are asked, requests whose deadline has come go to the best
rank without regard to how full it is. A request for a named rank waits for that rank alone, in its class's turn.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from asyncep_router.block_chain import block_chain
from asyncep_router.books import Books, Counters
from asyncep_router.config import Limits
from asyncep_router.errors import DuplicateRequestError, IntegrityError, UnknownRankError
from asyncep_router.fairness import Level, Shares
from asyncep_router.ledger import Charge
from asyncep_router.messages import Dispatch, Reason
from asyncep_router.prefix_queue import Entry, PrefixQueue
from asyncep_router.ranks import members
from asyncep_router.rules import Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncep_router.cost import ModelCost
    from asyncep_router.kv_events import KVEvent
    from asyncep_router.messages import BatchReport, Request
    from asyncep_router.prefix import PrefixView
    from asyncep_router.rules import Send


class RoutingPolicy:
    """A `Policy` with its books. Not thread-safe: one owner calls it.

    `cost` is the model's, `view` what the ranks hold (a `PrefixView`), `limits` the settings.
    """

    def __init__(self, cost: ModelCost, view: PrefixView, limits: Limits | None = None) -> None:
        self.books = Books(cost, view, limits or Limits())
        self.view = view
        self.limits = self.books.limits
        self.ledger = self.books.ledger
        self.gate = self.books.gate
        self.counters = self.books.counters
        self._rules = Rules(self.books)
        self.reasons: dict[Reason, int] = dict.fromkeys(Reason, 0)
        self._levels: dict[int, Level] = {}  # by priority, highest first
        self._shares = Shares(self.limits.least_share)
        self._known: set[int] = set()
        self._waiting: dict[str, Entry] = {}
        self._flying: dict[str, Entry] = {}
        self._aside: dict[str, Entry] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._arrivals: list[tuple[float, int, str]] = []
        self._seq = 0

    @property
    def cost(self) -> ModelCost:
        """The model's. Charges made stay as they were booked when another takes its place."""
        return self.books.cost

    @cost.setter
    def cost(self, cost: ModelCost) -> None:
        self.books.cost = cost

    # Ranks

    def rank_joined(
        self,
        rank: int,
        *,
        caches: bool = True,
        cache_tokens: int | None = None,
        gathers: bool = False,
        threshold: float | None = None,
    ) -> None:
        """See `Policy`. A rank that is back keeps the T it had, unless another is given."""
        if rank < 0:
            raise UnknownRankError(f"rank {rank} is below 0")
        self.books.join(rank, caches=caches, gathers=gathers)
        if threshold is None:
            threshold = self.gate.threshold(rank) if rank in self._known else self.limits.default_threshold
        self._known.add(rank)
        self.gate.join(rank, threshold)
        self.gate.set_trial(rank, False)
        self.view.set_capacity(rank, cache_tokens)

    def rank_died(self, rank: int) -> list[Request]:
        """The rank is gone with everything in it. Its requests wait again, in their original order.

        Returns them, for the log. Requests for that rank by name keep waiting for it to come back.
        """
        self.gate.leave(rank)
        charges = self.ledger.take_back_all(rank)
        self.books.note(rank)
        self.view.remove_rank(rank)
        self._forget_cache(rank)
        entries = sorted((self._landed(charge) for charge in charges), key=_by_seq)
        self.books.claimed[rank] = 0
        for entry in entries:
            self._wait(entry)
        self.counters.returned += len(entries)
        return [entry.request for entry in entries]

    def set_accepting(self, rank: int, accepting: bool, *, trial: bool = False) -> None:
        """See `Policy`."""
        threshold = self.gate.threshold(rank)  # raises if it never joined
        self.gate.set_trial(rank, trial)
        if accepting:
            self.gate.join(rank, threshold)
        else:
            self.gate.leave(rank)

    def set_threshold(self, rank: int, layer_flops: float) -> None:
        """T as the rank calibrated it: FLOPs per layer and batch from which its gather hides."""
        self.gate.set_threshold(rank, self.cost.threshold_flops(layer_flops))

    def cache_cleared(self, rank: int) -> None:
        """The rank's cache was flushed."""
        self.view.clear(rank)
        self._forget_cache(rank)

    def apply_event(self, rank: int, event: KVEvent) -> None:
        """A rank's cache reports what it stored or dropped."""
        self.view.apply_event(rank, event)

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """A request arrives. Raises `DuplicateRequestError`, `UnknownRankError` (pinned to no rank)."""
        rid = request.rid
        if rid in self._waiting or rid in self._flying or rid in self._aside:
            raise DuplicateRequestError(f"{rid!r} is pending or in flight already")
        if request.pinned is not None and request.pinned not in self._known:
            raise UnknownRankError(f"{rid!r} asks for rank {request.pinned}, which never joined")
        entry = Entry(request, self._seq, self._chain(request))
        self._seq += 1
        self.counters.submitted += 1
        self._wait(entry)

    def report(self, report: BatchReport, now: float) -> list[Charge]:
        """A rank finished a batch. Returns the charges settled."""
        done = self.ledger.settle(report)
        for charge in done:
            self._landed(charge)
        self.books.note(report.rank)
        self.counters.finished += len(done)
        return done

    def abort(self, rid: str = "", *, prefix: bool = False, everything: bool = False) -> list[Request]:
        """Withdraw waiting requests: one id, all ids that begin with `rid`, or everything.

        Returns those withdrawn: they were never sent, and answering them is up to the caller. Requests in
        flight stay charged until their rank reports them or `abandon` is called.
        """
        entries: list[Entry] = []
        for kept in (self._waiting, self._aside):
            if everything:
                entries += kept.values()
            elif prefix:
                entries += [entry for name, entry in kept.items() if name.startswith(rid)]
            elif rid in kept:
                entries.append(kept[rid])
        for entry in entries:
            if self._aside.pop(entry.request.rid, None) is None:
                self._unwait(entry)
        self.counters.aborted += len(entries)
        return [entry.request for entry in entries]

    def in_flight(self, rid: str = "", *, everything: bool = False) -> list[str]:
        """Ids of requests in flight that begin with `rid`, or of all."""
        return [name for name in self._flying if everything or name.startswith(rid)]

    def abandon(self, rid: str) -> bool:
        """A request in flight will not be reported (its rank dropped it). True if it was in flight."""
        charge = self.ledger.take_back(rid)
        if charge is None:
            return False
        self._landed(charge)
        self.books.note(charge.rank)
        self.counters.aborted += 1
        return True

    def send_back(self, rid: str) -> bool:
        """A request in flight could not be delivered: it waits again, in its old place."""
        charge = self.ledger.take_back(rid)
        if charge is None:
            return False
        self.books.note(charge.rank)
        self.counters.returned += 1
        self._wait(self._landed(charge))
        return True

    def set_aside(self, rid: str) -> bool:
        """A waiting request is no longer the policy's to send: it waits for `send_alone` or `abort`.

        True if it was waiting.
        """
        entry = self._waiting.get(rid)
        if entry is None:
            return False
        self._unwait(entry)
        self._aside[rid] = entry
        return True

    def send_alone(self, rid: str, rank: int, now: float) -> Dispatch | None:
        """A request that was set aside goes to a rank, which need not accept work. None if it is not there."""
        entry = self._aside.pop(rid, None)
        if entry is None:
            return None
        self._wait(entry)
        return self._dispatch(entry, rank, Reason.ALONE, now)

    # Decisions

    def poll(self, now: float) -> list[Dispatch]:
        """Everything that is to be sent now. Charged already; the caller only sends."""
        out: list[Dispatch] = []
        if not self.gate.alive:
            return out
        self._serve_overdue(now, out)
        if self._holding(now):
            return out
        old = now - self.limits.starve_after
        classes = [(level, bulk) for level in self._levels.values() for bulk in (False, True)]
        classes = [(level, bulk) for level, bulk in classes if (level.bulk if bulk else len(level) - level.bulk)]
        self._serve_starving(classes[1:], old, now, out)
        behind = sum(map(len, self._levels.values()))
        for level, bulk in classes:
            passes = self.limits.ranks_let_pass and not bulk and level is classes[0][0]
            if not (self.gate.express if passes else self.gate.open):
                break
            behind -= level.bulk if bulk else len(level) - level.bulk

            def send(entry: Entry, rank: int, reason: Reason, *, behind: int = behind) -> None:
                out.append(self._dispatch(entry, rank, reason, now))
                if behind > 0:
                    self._shares.earn(out[-1].flops, self.gate.batch(rank))

            self._serve_pinned(level, bulk, passes, send)
            if bulk:
                self._serve_flows(level, old, send)
            else:
                self._rules.serve(level.quick, old, send)
                if passes:
                    self._rules.serve_express(level.quick, old, send)
        for priority, level in list(self._levels.items()):
            if not level:
                del self._levels[priority]
        return out

    def next_wakeup(self, now: float) -> float | None:
        """When `poll` could have something to say without any event before; None if never."""
        times = []
        if self.gate.alive:
            deadline = self._first(self._deadlines)
            if deadline is not None:
                times.append(max(deadline, now))
            if self._holding(now):
                arrival = self._first(self._arrivals)
                if arrival is not None:
                    times.append(arrival + self.limits.max_wait)
            patience = self.limits.starve_after
            since = (since for queue in self._queues() for _, since in queue.parked_groups())
            times += [start + patience for start in since if start + patience > now]
        return min(times, default=None)

    # Looking in

    @property
    def pending(self) -> int:
        """Requests that wait in the router."""
        return len(self._waiting)

    def outstanding(self, rank: int) -> int:
        """FLOPs a rank has in flight."""
        return self.ledger.account(rank).outstanding

    def threshold(self, rank: int) -> float:
        """T of a rank, FLOPs of a pass. Raises `UnknownRankError`."""
        return self.gate.threshold(rank)

    def where(self, rid: str) -> int | None:
        """The rank a request was sent to; None if it waits or is unknown."""
        return self.ledger.rank_of(rid)

    def requests_in_flight(self, rank: int) -> list[str]:
        """Ids of what a rank has not reported yet, in order of dispatch."""
        return list(self.ledger.account(rank).in_flight)

    def requests_waiting(self) -> list[Request]:
        """What has not been sent: requests that wait in the router and those set aside."""
        return [entry.request for kept in (self._waiting, self._aside) for entry in kept.values()]

    def request(self, rid: str) -> Request | None:
        """A request in flight; None if it waits or is unknown."""
        entry = self._flying.get(rid)
        return None if entry is None else entry.request

    def snapshot(self) -> dict[str, Any]:
        """The state as plain data, for `/router/state` and metrics. FLOPs, tokens, counts."""
        ranks = {}
        for rank in sorted(self._known):
            account = self.ledger.account(rank)
            threshold = self.gate.threshold(rank)
            ranks[rank] = {
                "accepting": bool(self.gate.alive >> rank & 1),
                "saturated": not self.gate.unsaturated >> rank & 1,
                "outstanding_flops": account.outstanding,
                "threshold_flops": threshold,
                "batch_flops": self.gate.batch(rank),
                "fill": account.outstanding / threshold,
                "charged_flops": account.charged,
                "settled_flops": account.settled,
                "returned_flops": account.returned,
                "saved_flops": account.saved_flops,
                "requests_in_flight": len(account.in_flight),
                "requests_pinned": sum(level.count_pinned(rank) for level in self._levels.values()),
                "view_tokens": self.view.tokens_of(rank),
                "expected_cached_tokens": account.expected_cached,
                "found_cached_tokens": account.found_cached,
                "flops_per_second": account.flops_per_second,
            }
        counters = {name: getattr(self.counters, name) for name in Counters.__slots__}
        return {
            "pending": self.pending,
            "set_aside": len(self._aside),
            "pending_bulk": sum(level.bulk for level in self._levels.values()),
            "pending_flops": self.books.waiting_flops,
            "view_tokens": self.view.total_tokens,
            "unknown_reports": self.ledger.unknown_reports,
            "reasons": {reason.value: count for reason, count in self.reasons.items()},
            "ranks": ranks,
            **counters,
        }

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if any two books disagree. Walks everything: tests and idle moments."""
        self.ledger.check_integrity()
        self.gate.check_integrity()
        self.view.check_integrity()
        for level in self._levels.values():
            level.check_integrity()
        queued = sum(len(level) for level in self._levels.values())
        if queued != len(self._waiting):
            raise IntegrityError(f"{queued} requests queued, {len(self._waiting)} waiting")
        flops = sum(entry.flops for entry in self._waiting.values())
        if flops != self.books.waiting_flops:
            raise IntegrityError(f"{flops} FLOPs wait, {self.books.waiting_flops} booked")
        counters = self.counters
        left = counters.submitted - counters.finished - counters.aborted
        if left != len(self._waiting) + len(self._flying) + len(self._aside):
            raise IntegrityError(f"{left} requests are neither finished nor aborted: {counters}")
        for rank in self._known:
            account = self.ledger.account(rank)
            flying = [self._flying[rid] for rid in account.in_flight]
            if {block for entry in flying for block in entry.warms} != self.books.under_way.blocks(rank):
                raise IntegrityError(f"rank {rank}: blocks being computed are not those of its requests")
            if self.gate.alive >> rank & 1 and (account.outstanding == 0) != bool(self.gate.idle >> rank & 1):
                raise IntegrityError(f"rank {rank}: {account.outstanding} FLOPs outstanding, gate disagrees")

    # Waiting

    def _chain(self, request: Request) -> tuple[int, ...]:
        chain = block_chain(request.token_ids, self.limits.block, request.namespace)
        if chain:
            return chain
        # Shorter than a block: it shares with its equals only.
        return (hash((request.namespace, "short", request.token_ids.tobytes())),)

    def _wait(self, entry: Entry) -> None:
        request = entry.request
        entry.flops = self.books.net_flops(entry)
        self._waiting[request.rid] = entry
        self.books.waiting_flops += entry.flops
        self._level(request.priority).add(entry, self.limits.window * self.gate.capacity, self.gate.least_weight)
        if request.pinned is None:
            if request.deadline is not None:
                heapq.heappush(self._deadlines, (request.deadline, entry.seq, request.rid))
            if self.limits.max_wait > 0:
                heapq.heappush(self._arrivals, (request.arrival, entry.seq, request.rid))

    def _unwait(self, entry: Entry) -> None:
        request = entry.request
        del self._waiting[request.rid]
        self.books.waiting_flops -= entry.flops
        self._levels[request.priority].remove(entry)

    def _level(self, priority: int) -> Level:
        level = self._levels.get(priority)
        if level is None:
            level = Level(lambda: PrefixQueue(self.limits.block, self.limits.affinity), self.books.match)
            self._levels[priority] = level
            self._levels = dict(sorted(self._levels.items(), reverse=True))
        return level

    def _first(self, heap: list[tuple[float, int, str]]) -> float | None:
        """The earliest time in a heap whose request still waits."""
        while heap:
            time, seq, rid = heap[0]
            entry = self._waiting.get(rid)
            if entry is not None and entry.seq == seq:
                return time
            heapq.heappop(heap)
        return None

    def _holding(self, now: float) -> bool:
        """Whether the little work there is waits for company: every rank is idle or refuses, less than a batch
        waits, and nobody has waited `max_wait` yet."""
        if not self.limits.max_wait or self.gate.open & ~self.gate.idle or not self.gate.idle:
            return False
        least = min(self.gate.batch(rank) for rank in members(self.gate.idle))
        if self.books.waiting_flops >= least:
            return False
        arrival = self._first(self._arrivals)
        return arrival is not None and now < arrival + self.limits.max_wait

    def _queues(self) -> Iterator[PrefixQueue]:
        for level in self._levels.values():
            yield from level.queues()

    def _forget_cache(self, rank: int) -> None:
        for queue in self._queues():
            queue.forget_rank(rank)

    # Sending

    def _serve_pinned(self, level: Level, bulk: bool, passes: bool, send: Send) -> None:
        """Requests of a class for a rank by name, while that rank has room; for those that pass bulk, besides it."""
        for rank in level.pinned_ranks(bulk):
            while (entry := level.pinned_to(rank, bulk)) is not None:
                if not (self.gate.express if passes else self.gate.open) >> rank & 1:
                    break
                send(entry, rank, Reason.PINNED)

    def _serve_flows(self, level: Level, old: float, send: Send) -> None:
        """A level's flows in turn, a batch each, until nothing more fits."""
        most = self.gate.capacity / max(1, self.gate.alive.bit_count())
        while self.gate.open:
            turns = level.turns()
            if len(turns) == 1:
                self._rules.serve(turns[0].queue, old, send)
                return
            if not any(self._rules.serve_some(flow.queue, old, send, most) for flow in turns):
                return

    def _serve_starving(self, classes: list[tuple[Level, bool]], old: float, now: float, out: list[Dispatch]) -> None:
        """Those that are behind and wait since before `old` take the share they have earned."""

        def send(entry: Entry, rank: int, reason: Reason) -> None:
            out.append(self._dispatch(entry, rank, reason, now))
            self._shares.pay(out[-1].flops)

        while classes and self._shares.credit > 0 and self.gate.open:
            queues: list[PrefixQueue] = []
            pinned: list[Entry] = []
            for level, bulk in classes:
                queues += [flow.queue for flow in level.flows.values()] if bulk else [level.quick]
                waiting = (level.pinned_to(rank, bulk) for rank in level.pinned_ranks(bulk))
                pinned += [entry for entry in waiting if entry is not None]
            entry = self._rules.starving(queues, old)
            named = min((e for e in pinned if self._can_go(e, old)), key=_by_seq, default=None)
            if named is not None and named.request.pinned is not None and (entry is None or named.seq < entry.seq):
                send(named, named.request.pinned, Reason.PINNED)
            elif entry is not None:
                self._rules.take(entry, send)
            else:
                return

    def _can_go(self, entry: Entry, old: float) -> bool:
        """Whether a request for a rank by name waits since before `old` and the rank has room."""
        rank = entry.request.pinned
        return rank is not None and bool(self.gate.open >> rank & 1) and entry.request.arrival <= old

    def _serve_overdue(self, now: float, out: list[Dispatch]) -> None:
        while (deadline := self._first(self._deadlines)) is not None and deadline <= now:
            entry = self._waiting[self._deadlines[0][2]]
            ranks = self.gate.unsaturated or self.gate.open or self.gate.alive
            out.append(self._dispatch(entry, self._rules.best(entry, ranks)[0], Reason.DEADLINE, now))

    def _dispatch(self, entry: Entry, rank: int, reason: Reason, now: float) -> Dispatch:
        """Charge an entry to a rank and take it out of the queue."""
        request = entry.request
        bit = 1 << rank
        held = self.books.match(entry).held_by(rank) if self.books.caching & bit else 0
        new, cached = self.books.split(request, held)
        # At least 1: a rank with a request in flight must never look idle.
        flops = max(1, self.cost.flops(new, cached, request.logits))
        saved = self.cost.flops(len(request.token_ids), 0, request.logits) - flops
        self.ledger.charge(Charge(request.rid, rank, flops, new, cached, now, bool(entry.bulk)), saved)
        self.books.note(rank)
        level = self._levels[request.priority]
        level.charge(entry, flops)
        claimed = self.books.claimed.get(rank, 0) - entry.flops
        if self.books.caching & bit:
            claimed += level.serve(entry, rank)
        else:
            level.remove(entry)
        self.books.claimed[rank] = max(0, claimed)
        del self._waiting[request.rid]
        self.books.waiting_flops -= entry.flops
        if self.books.caching & bit and self.limits.await_prefix:
            missing = entry.chain[held // self.limits.block :]
            entry.warms = self.books.under_way.begin(rank, request.rid, missing)
        if self.books.caching & bit:
            self.view.insert(rank, request.token_ids, request.namespace)
        self._flying[request.rid] = entry
        counters = self.counters
        counters.dispatched += 1
        counters.prompt_tokens += new + cached
        counters.cached_tokens += cached
        counters.charged_flops += flops
        counters.saved_flops += saved
        self.reasons[reason] += 1
        return Dispatch(request.rid, rank, reason, cached, flops, now - request.arrival, request, bool(entry.bulk))

    def _landed(self, charge: Charge) -> Entry:
        """A request left its rank, finished or not: what it was computing is there, or is not coming."""
        entry = self._flying.pop(charge.rid)
        self.books.under_way.end(charge.rank, entry.warms)
        if entry.warms:
            for queue in self._queues():
                if queue.parked >> charge.rank & 1:
                    queue.unpark(charge.rank)
        entry.warms = ()
        return entry


def _by_seq(entry: Entry) -> int:
    return entry.seq
