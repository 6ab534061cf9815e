"""Who goes where: the rules by which ranks and waiting requests are brought together. They read the books.

The three rules of the MoE-Prefill paper, as they are read here, for every request that is placed:

F1  among the ranks below T, the one that holds the longest prefix of it;
F2  FLOPs net of that prefix are charged at once, and the prefix counts as held from then on;
F3  without a prefix, the fullest rank below T: ranks are filled one after another, so that little work
    makes few full batches rather than many below T.

Work that fits no rank now waits here, not in a rank. Each `poll` serves, for one queue after another
(`fairness.py` says which), in this order, and repeats until nothing more fits:

1.  ranks below T that hold prefixes of waiting requests take those;
2.  ranks below T take requests whose prefix nobody holds;
3.  ranks below T take requests of which another rank holds only the lesser part;
4.  no rank being idle, ranks below T take requests that have waited `starve_after` for a prefix they are still
    computing;
5.  ranks at T but not yet at `inflight_target` batches take requests whose prefix they hold;
6.  an idle rank takes whatever there is, from the group with the most work per token of prefix: computing a
    prefix twice costs less than a device that stands still. But not company of a prefix that is still being
    computed, as long as the rank that computes it has room for all such company: then one copy is enough;
7.  all ranks being at T, those below `inflight_target` batches take requests whose prefix nobody holds.

Two refinements, both measured by simulation (`bench/router_simulated.py`). In 1 and 5 a prefix that is still being
computed does not count as held (`await_prefix`): the prompts of one batch cannot use each other's prefixes, so a
prefix's first request goes ahead, among those of other groups, and its company follows when that batch is reported.
A rank computes its batches one after another, so company sent earlier would begin no earlier; it would only
share the batch of the first. What waiting can cost is the way of the report and back; a prefix that costs
less to repeat (`await_share`) does not hold anybody up, nor does any while all there is makes less than one batch of
T on a rank that gathers: two batches would take twice as long. And in 2 and 7 a rank that has more than a batch of
work waiting beyond what it may hold takes no new groups: the first request of a group commits the rank to the
rest of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncep_router.messages import Reason
from asyncep_router.ranks import members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from asyncep_router.books import Books
    from asyncep_router.prefix_queue import Entry, Group, PrefixQueue

    Send = Callable[[Entry, int, Reason], None]


class Rules:
    """Decides by what the books say, and changes none of them but by `send` and by `_unclaim`.

    Args:
        books: of the policy.
    """

    def __init__(self, books: Books) -> None:
        self.books = books
        self.limits = books.limits
        self.ledger = books.ledger
        self.gate = books.gate
        self.under_way = books.under_way

    def serve_some(self, level: PrefixQueue, old: float, send: Send, most: float) -> bool:
        """As `serve`, until `most` FLOPs are sent. True if anything was."""
        sent = 0.0

        def counted(entry: Entry, rank: int, reason: Reason) -> None:
            nonlocal sent
            sent += entry.flops
            send(entry, rank, reason)

        self.serve(level, old, counted, until=lambda: sent >= most)
        return sent > 0

    def serve(self, level: PrefixQueue, old: float, send: Send, until: Callable[[], bool] | None = None) -> None:
        """The seven steps of the module's text for one queue, until none of them finds anything.

        `old`: who has waited since before this has waited too long. `send` charges an entry to a rank and takes it
        out of `level`. `until`: asked before each step whether to stop.
        """
        gate = self.gate
        while level and gate.open and not (until is not None and until()):
            below = gate.unsaturated
            if below and self._take_owned(level, below, old, send):
                continue
            if below and self._take(level.next_free(), below, send, claims=True):
                continue
            if below and self._take(level.next_loose(), below, send):
                continue
            if below & level.parked and self._take_parked(level, below & level.parked, old, send):
                continue
            if gate.open & ~below and self._take_owned(level, gate.open & ~below, old, send):
                continue
            if gate.idle:
                entry = level.next_steal(self._worth_a_copy(level, old))
                if entry is not None:
                    send(entry, self.best(entry, gate.idle)[0], Reason.STEAL)
                    continue
            if not below and gate.open and self._take(level.next_free(), gate.open, send, claims=True):
                continue
            return

    def serve_express(self, level: PrefixQueue, old: float, send: Send) -> None:
        """What `serve` has left goes to ranks that have room for quick requests besides their bulk, the group that
        waits longest first. Who waits for a prefix that is being computed goes on waiting."""
        if not self.gate.express & ~self.gate.open:
            return
        for group in level.groups():
            while self.gate.express and group.alive and group.queue and not self._prefix_comes(group.head, old):
                send(group.head, *self.best(group.head, self.gate.express))

    def _prefix_comes(self, entry: Entry, old: float) -> bool:
        """Whether a rank that holds the most of it has begun to compute that after `old`, and it pays to wait."""
        longest = next((holders for _, holders in self.books.match(entry).steps), 0)
        begun = (self._pays_to_wait(entry, rank) for rank in members(longest & self.gate.alive))
        return any(since is not None and since > old for since in begun)

    def _take_owned(self, level: PrefixQueue, ranks: int, old: float, send: Send) -> bool:
        """One of `ranks` takes a request whose prefix it holds."""
        while ranks & level.owned:
            rank = self._fullest(ranks & level.owned)
            entry = level.next_owned(rank, old)
            if entry is None:
                if not level.parked >> rank & 1:
                    self._unclaim(rank)
            elif (since := self._pays_to_wait(entry, rank)) is not None and since > old:
                level.park(entry, rank, since)
            else:
                return self._take(entry, ranks, send, suggested=rank)
        return False

    def _take_parked(self, level: PrefixQueue, ranks: int, old: float, send: Send) -> bool:
        """One of `ranks` takes a request whose prefix it has been computing for too long, if no idle rank can take it
        and no other rank has begun to compute the prefix since."""
        if self.gate.idle:
            return False
        overdue = self._overdue(level, old)
        for rank in members(ranks if overdue else 0):
            for group, since in level.parked_groups(rank):
                if since <= old and not group.parked & self.gate.alive & ~overdue[id(group)]:
                    send(group.head, rank, Reason.LONGEST_PREFIX)
                    return True
        return False

    def _overdue(self, level: PrefixQueue, old: float) -> dict[int, int]:
        """By id of the group: the ranks that have been computing its prefix for too long."""
        overdue: dict[int, int] = {}
        for rank in members(level.parked):
            for group, since in level.parked_groups(rank):
                if since <= old:
                    overdue[id(group)] = overdue.get(id(group), 0) | 1 << rank
        return overdue

    def _pays_to_wait(self, entry: Entry, rank: int) -> float | None:
        """Since when `rank` has been computing the entry's prefix, if it saves more than the gap that waiting leaves
        that everybody who waits for it does not compute it as well; else None. While all there is makes less than T,
        nothing is saved on a rank that gathers."""
        everything = self.ledger.account(rank).outstanding + self.books.waiting_flops
        if self.books.gathering >> rank & 1 and everything < self.gate.threshold(rank):
            return None
        company = len(entry.group.queue) if entry.group is not None else 1
        saved = self._recomputed(entry, rank) * company
        if saved <= self.limits.await_share * self.gate.batch(rank):
            return None
        return self.ledger.account(rank).in_flight[self.under_way.computed_by(rank, entry.chain)].at

    def _worth_a_copy(self, level: PrefixQueue, old: float) -> Callable[[Group], bool]:
        """Which groups an idle rank may take from: all but those whose prefix is coming, in time, on a rank that may
        hold all the company that waits for it."""
        roomy = 0
        for rank in members(level.parked & self.gate.alive):
            load = self.ledger.account(rank).outstanding
            load += sum(self._company_flops(group) for group, _ in level.parked_groups(rank))
            if load <= self.gate.limit(rank):
                roomy |= 1 << rank
        overdue = self._overdue(level, old)
        return lambda group: not group.parked & roomy & ~overdue.get(id(group), 0)

    def _company_flops(self, group: Group) -> int:
        """FLOPs of a group's requests once their common prefix is there, as if all were equally long."""
        count = len(group.queue)
        shared = group.node.depth * self.limits.block
        return count * self.books.cost.flops(max(1, group.tokens // count - shared), shared)

    def _take(
        self,
        entry: Entry | None,
        ranks: int,
        send: Send,
        *,
        suggested: int | None = None,
        claims: bool = False,
    ) -> bool:
        """Place an entry on one of `ranks` by F1, then F3. False if there is no entry, or if it `claims` a
        group and all of `ranks` are committed to enough."""
        if entry is None:
            return False
        if claims and entry.group is not None and len(entry.group.queue) > 1:
            ranks &= ~self._committed(ranks)
            if not ranks:
                return False
        send(entry, *self.best(entry, ranks, suggested))
        return True

    def best(self, entry: Entry, ranks: int, suggested: int | None = None) -> tuple[int, Reason]:
        """The rank of a non-empty set where an entry should go, and why. `suggested` is thought to hold it."""
        if "F1" in self.limits.without:
            return self._fullest(ranks), Reason.FILL
        for _, holders in self.books.match(entry).steps:
            if holders & ranks:
                if suggested is not None and holders >> suggested & 1:
                    return suggested, Reason.LONGEST_PREFIX
                rank = self._fullest(holders & ranks)
                if not self._recomputed(entry, rank):
                    return rank, Reason.LONGEST_PREFIX
        if suggested is not None:  # the view has forgotten what the queue remembers
            return suggested, Reason.FILL
        rank = self._fullest(ranks)
        return rank, Reason.LEAST_FLOPS if self.gate.idle >> rank & 1 else Reason.FILL

    def _fullest(self, ranks: int) -> int:
        """F3 among a non-empty set: the fullest below T; else the idle one charged least so far; else the
        least full."""
        gate = self.gate
        if not ranks & (ranks - 1):
            return ranks.bit_length() - 1
        if "F3" in self.limits.without:
            return min(members(ranks), key=gate.fill)
        filling = ranks & gate.unsaturated & ~gate.idle
        if filling:
            return max(members(filling), key=gate.fill)
        idle = ranks & gate.idle
        if idle:
            return min(members(idle), key=lambda rank: self.ledger.account(rank).charged)
        return min(members(ranks), key=gate.fill)

    def starving(self, queues: Iterable[PrefixQueue], old: float) -> Entry | None:
        """Of these queues' requests that a rank with room can take next, the oldest that waits since before `old`."""
        gate = self.gate
        waiting = []
        for queue in queues:
            waiting.append(queue.next_free())
            waiting += [queue.next_owned(rank, old) for rank in members(gate.open & queue.owned)]
        found = (entry for entry in waiting if entry is not None and entry.request.arrival <= old)
        return min(found, key=_by_seq, default=None)

    def take(self, entry: Entry, send: Send) -> None:
        """Place an entry on the best rank that has room; there is one."""
        self._take(entry, self.gate.unsaturated or self.gate.open, send)

    def _committed(self, ranks: int) -> int:
        """Those of `ranks` with their fair share of all work, or a batch beyond what they may hold if that
        is more, in flight and waiting for them."""
        alive = list(members(self.gate.alive))
        everything = self.books.waiting_flops + sum(self.ledger.account(rank).outstanding for rank in alive)
        share = everything / len(alive)
        committed = 0
        for rank in members(ranks):
            load = self.ledger.account(rank).outstanding + self.books.claimed.get(rank, 0)
            if load >= max(share, self.gate.limit(rank) + self.gate.batch(rank)):
                committed |= 1 << rank
        return committed

    def _recomputed(self, entry: Entry, rank: int) -> int:
        """FLOPs of the part of its prompt that `rank` holds only in the sense that it is computing it.

        Sent now, the request might land in the same batch and compute that part again.
        """
        if not self.under_way.computes(rank):
            return 0
        block = self.limits.block
        depth = min(self.books.match(entry).held_by(rank) // block, len(entry.chain))
        there = self.under_way.there(rank, entry.chain, depth)
        return self.books.cost.flops((depth - there) * block, there * block, 0) if there < depth else 0

    def _unclaim(self, rank: int) -> None:
        """A rank has taken all that it was committed to."""
        self.books.claimed[rank] = 0


def _by_seq(entry: Entry) -> int:
    return entry.seq
