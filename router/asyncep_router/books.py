"""What the policy knows: ranks, their loads and caches, and what waits. `RoutingPolicy` owns it, `rules` read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncep_router.gate import Gate
from asyncep_router.ledger import Ledger
from asyncep_router.under_way import UnderWay

if TYPE_CHECKING:
    from asyncep_router.config import Limits
    from asyncep_router.cost import ModelCost
    from asyncep_router.messages import Request
    from asyncep_router.prefix import PrefixMatch, PrefixView
    from asyncep_router.prefix_queue import Entry


@dataclass(slots=True)
class Counters:
    """Running totals for metrics; requests unless named otherwise."""

    submitted: int = 0
    dispatched: int = 0
    finished: int = 0
    aborted: int = 0
    returned: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    charged_flops: int = 0
    saved_flops: int = 0


class Books:
    """One set for each policy.

    `cost` is the model's, and may be replaced: charges made stay as they were booked. `view` is what the ranks hold.
    `claimed`: FLOPs waiting that a rank is committed to, roughly. `waiting_flops`: FLOPs of all that waits.
    `gathering`: ranks for which a batch below T takes as long as one of T. `caching`: ranks that keep prefixes.
    """

    def __init__(self, cost: ModelCost, view: PrefixView, limits: Limits) -> None:
        self.cost = cost
        self.view = view
        self.limits = limits
        self.ledger = Ledger()
        self.gate = Gate(limits.inflight_target, limits.least_batch, limits.most_requests)
        self.under_way = UnderWay()
        self.counters = Counters()
        self.claimed: dict[int, int] = {}
        self.waiting_flops = 0
        self.gathering = 0
        self.caching = 0

    def join(self, rank: int, *, caches: bool, gathers: bool) -> None:
        """A rank is there."""
        bit = 1 << rank
        self.ledger.open(rank)
        self.caching = self.caching & ~bit | (bit if caches else 0)
        self.gathering = self.gathering & ~bit | (bit if gathers else 0)

    def note(self, rank: int) -> None:
        """What a rank has in flight changed: the gate is told."""
        account = self.ledger.account(rank)
        self.gate.note(rank, account.outstanding, len(account.in_flight), account.quick, account.quick_requests)

    def match(self, entry: Entry) -> PrefixMatch:
        """What the ranks hold of it now; walked again only after the view changed."""
        view = self.view
        if entry.match is None or entry.version != view.version:
            entry.match = view.match(entry.request.token_ids, entry.request.namespace)
            entry.version = view.version
        return entry.match

    def split(self, request: Request, held: int) -> tuple[int, int]:
        """(new, cached) tokens. The last token is always computed, and only whole pages are reused."""
        length = len(request.token_ids)
        if "F2" in self.limits.without:
            return length, 0
        page = self.view.page_size
        cached = min(held, (length - 1) // page * page) if length else 0
        return length - cached, cached

    def net_flops(self, entry: Entry) -> int:
        """FLOPs of a request on the rank that holds the most of it."""
        return self.cost.flops(*self.split(entry.request, self.match(entry).longest), entry.request.logits)
