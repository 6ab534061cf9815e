"""Whose requests wait where, so that one client's work does not hold up another's. Pure.

Requests of one priority wait in two classes:

- **quick**: requests of clients of whom little waits, all in one queue, so that prefixes are shared across clients;
- **bulk**: everything else, in *flows* that take turns: each long list is a flow, and so are the single requests of a
  client of whom much waits.

Quick goes first. A client is held to a window of quick work, a share of what the ranks compute in one batch; so a
request that comes waits for what the ranks were given before, and for at most one window of every other client. A list
is long if all of it would cost more than the window: N requests of a list count N times. When a client's window is
full, all that it has waiting becomes bulk, and what comes until none of that waits any more: in one queue, in order,
and with its prefixes together.

Clients take turns with their bulk by start-time fair queueing: the one that got the fewest FLOPs goes next, and of its
flows the one that did. Who is new begins where the others are, and so neither waits for them nor has to catch up.
Within a flow requests are grouped by prefix as ever. What bulk and lower priorities get at least while quick or higher
work never ends is `Shares`.
"""

from __future__ import annotations

import math
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

from asyncep_router.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from asyncep_router.prefix import PrefixMatch
    from asyncep_router.prefix_queue import Entry, PrefixQueue


class _Owner:
    """A client with bulk: the virtual time of its next request, in FLOPs, that of its flows, and how many they are."""

    __slots__ = ("flows", "now", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.now = 0.0
        self.flows = 0


class Flow:
    """Bulk requests that belong together. `start`: virtual time of its next request among its client's."""

    __slots__ = ("key", "owner", "pinned", "queue", "start")

    def __init__(self, owner: _Owner, key: tuple[str, str], queue: PrefixQueue) -> None:
        self.owner = owner
        self.key = key
        self.queue = queue
        self.start = owner.now
        owner.flows += 1
        self.pinned = 0
        """Its requests for a named rank, which are not in `queue`."""


class _Held:
    """What waits of a client in quick, by order of submission, and what it weighs, in FLOPs."""

    __slots__ = ("entries", "weight")

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.weight = 0.0


class Level:
    """All pending requests of one priority.

    `make_queue` makes an empty queue. `match` says what the ranks hold of a request now.
    """

    def __init__(self, make_queue: Callable[[], PrefixQueue], match: Callable[[Entry], PrefixMatch]) -> None:
        self._make_queue = make_queue
        self._match = match
        self.quick = make_queue()
        self.flows: dict[tuple[str, str], Flow] = {}
        self.bulk = 0
        """Bulk requests that wait."""
        self._pinned: tuple[dict[int, dict[int, Entry]], dict[int, dict[int, Entry]]] = ({}, {})
        self._pinned_quick = 0
        self._held: dict[str, _Held] = {}  # what waits in quick, by client
        self._owners: dict[str, _Owner] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return len(self.quick) + self._pinned_quick + self.bulk

    def queues(self) -> Iterator[PrefixQueue]:
        """The quick one and those of all flows."""
        yield self.quick
        for flow in self.flows.values():
            yield flow.queue

    def add(self, entry: Entry, window: float, least: float) -> None:
        """File an entry. An entry that comes back stays what it was.

        `window`: FLOPs of one client's quick work. `least`: FLOPs that a request counts at least.
        """
        entry.weight = max(entry.flops, least)
        request = entry.request
        client = request.client
        if entry.bulk is None:
            long = request.company > 1 and request.company * entry.weight > window
            entry.flow_name = request.flow if long else ""
            entry.bulk = long or (client, "") in self.flows
            held = self._held.get(client)
            if not entry.bulk and held is not None and held.weight + entry.weight > window:
                for other in list(held.entries.values()):
                    self.remove(other)
                    self._file_bulk(other)
                entry.bulk = True
        if entry.bulk:
            self._file_bulk(entry)
        else:
            held = self._held.get(client)
            if held is None:
                held = self._held[client] = _Held()
            held.entries[entry.seq] = entry
            held.weight += entry.weight
            self._file(entry, self.quick)

    def remove(self, entry: Entry) -> None:
        """Take an entry out."""
        if entry.queue is not None:
            entry.queue.remove(entry)
        self._forget(entry)

    def serve(self, entry: Entry, rank: int) -> int:
        """`PrefixQueue.serve` of the queue that has it."""
        claimed = 0
        if entry.queue is not None:
            claimed = entry.queue.serve(entry, rank)
        self._forget(entry)
        return claimed

    def charge(self, entry: Entry, flops: float) -> None:
        """A waiting entry is sent: its flow has had its turn."""
        flow = entry.flow
        if flow is not None:
            flops = max(flops, entry.weight)
            owner = flow.owner
            self._now = max(self._now, owner.start)
            owner.start += flops
            owner.now = max(owner.now, flow.start)
            flow.start += flops

    def turns(self) -> list[Flow]:
        """Flows with anything for any rank, whose turn it is first."""
        flows = [flow for flow in self.flows.values() if flow.queue]
        return flows if len(flows) < 2 else sorted(flows, key=_by_start)

    def pinned_ranks(self, bulk: bool) -> list[int]:
        """Ranks that requests of a class wait for by name."""
        return list(self._pinned[bulk])

    def pinned_to(self, rank: int, bulk: bool) -> Entry | None:
        """The first request of a class for a rank by name."""
        waiting = self._pinned[bulk].get(rank)
        return next(iter(waiting.values())) if waiting else None

    def count_pinned(self, rank: int) -> int:
        """Requests for a rank by name."""
        return sum(len(pinned.get(rank, ())) for pinned in self._pinned)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` if queues and counts disagree. Walks everything."""
        for queue in self.queues():
            queue.check_integrity()
        pinned = [list(chain.from_iterable(one.values() for one in each.values())) for each in self._pinned]
        quick = 0
        for entry in chain(self.quick.entries(), pinned[False]):
            quick += 1
            if entry.bulk or entry.flow is not None or entry.seq not in self._held[entry.request.client].entries:
                raise IntegrityError(f"{entry.request.rid!r} is not where quick requests are")
        if quick != sum(len(held.entries) for held in self._held.values()):
            raise IntegrityError(f"{quick} requests are quick, clients hold another number")
        for held in self._held.values():
            if not math.isclose(held.weight, sum(each.weight for each in held.entries.values())):
                raise IntegrityError("what a client holds weighs something else than its requests")
        if len(pinned[False]) != self._pinned_quick:
            raise IntegrityError(f"{len(pinned[False])} quick requests for a rank, {self._pinned_quick} counted")
        if self.bulk != len(pinned[True]) + sum(len(flow.queue) for flow in self.flows.values()):
            raise IntegrityError(f"{self.bulk} bulk requests counted, flows have another number")
        for key, flow in self.flows.items():
            if flow.key != key or not (flow.queue or flow.pinned):
                raise IntegrityError(f"flow {key} is misfiled or empty")
            if any(entry.flow is not flow for entry in flow.queue.entries()):
                raise IntegrityError(f"flow {key} has an entry of another")
        if Counter(client for client, _ in self.flows) != {name: owner.flows for name, owner in self._owners.items()}:
            raise IntegrityError("flows are miscounted")

    def _file_bulk(self, entry: Entry) -> None:
        """Into a flow of its client's: its long list's, or that of all else."""
        client = entry.request.client
        key = (client, entry.flow_name)
        flow = self.flows.get(key)
        if flow is None:
            owner = self._owners.get(client)
            if owner is None:
                owner = self._owners[client] = _Owner(self._now)
            flow = self.flows[key] = Flow(owner, key, self._make_queue())
        entry.bulk = True
        entry.flow = flow
        self.bulk += 1
        self._file(entry, flow.queue)

    def _file(self, entry: Entry, queue: PrefixQueue) -> None:
        """Into a queue, or aside if it names its rank."""
        rank = entry.request.pinned
        if rank is None:
            queue.add(entry, self._match(entry))
            entry.queue = queue
            return
        pinned = self._pinned[bool(entry.bulk)]
        waiting = pinned.setdefault(rank, {})
        late = bool(waiting) and entry.seq < next(reversed(waiting))
        waiting[entry.seq] = entry
        if late:
            pinned[rank] = dict(sorted(waiting.items()))
        if entry.flow is not None:
            entry.flow.pinned += 1
        else:
            self._pinned_quick += 1

    def _forget(self, entry: Entry) -> None:
        """Entry is out of its queue: out of the books too."""
        request = entry.request
        flow = entry.flow
        entry.queue = None
        if request.pinned is not None:
            waiting = self._pinned[bool(entry.bulk)]
            del waiting[request.pinned][entry.seq]
            if not waiting[request.pinned]:
                del waiting[request.pinned]
            if flow is None:
                self._pinned_quick -= 1
            else:
                flow.pinned -= 1
        if flow is None:
            held = self._held[request.client]
            held.weight -= entry.weight
            del held.entries[entry.seq]
            if not held.entries:
                del self._held[request.client]
            return
        entry.flow = None
        self.bulk -= 1
        if not flow.queue and not flow.pinned:
            del self.flows[flow.key]
            flow.owner.flows -= 1
            if not flow.owner.flows:
                del self._owners[request.client]


class Shares:
    """What those behind get while those before them never end: `share` of the FLOPs, once they have waited too long.

    Whenever something is sent before them they earn; what is sent of theirs out of turn they pay. They can save up one
    batch, so that nobody before them waits for more than that at once.
    """

    def __init__(self, share: float) -> None:
        self._rate = share / (1 - share)
        self.credit = 0.0

    def earn(self, flops: float, most: float) -> None:
        """Others were sent first. `most`: FLOPs of a batch."""
        self.credit = min(most, self.credit + flops * self._rate)

    def pay(self, flops: float) -> None:
        """One of theirs was sent out of turn."""
        self.credit -= flops


def _by_start(flow: Flow) -> tuple[float, float]:
    return flow.owner.start, flow.start
