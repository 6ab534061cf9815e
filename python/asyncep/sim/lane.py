"""A scheduler as the simulator sees it: a queue, a prefix cache, and batches cut from the queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncep.sim.work import Batch, Model
from asyncep_router.block_view import BlockView


@dataclass(frozen=True)
class BatchLimits:
    """Where a batch is cut. `tokens`: at most so many. `flops`: enough once it has so many (inf: tokens decide).

    `chunk`: a prompt that exceeds `tokens` is computed in several batches; without it such a prompt has a batch to
    itself. `cache_tokens`: size of the prefix cache, 0 for none (KV-free). `page`: its pages, tokens. `holds_back`: a
    request whose prefix the batch computes is left for the next one.
    """

    tokens: int
    flops: float = float("inf")
    chunk: bool = True
    cache_tokens: int = 0
    page: int = 64
    holds_back: bool = False


@dataclass(slots=True)
class Waiting:
    """A request in a lane. `done`: tokens of it that are computed or were found in the cache; `found`: the latter."""

    rid: str
    length: int
    chain: tuple[int, ...]
    done: int = 0
    found: int = 0
    begun: bool = False


@dataclass(slots=True)
class Cut:
    """A batch: its work, the requests it finishes, and the tokens each found in the cache."""

    work: Batch
    finished: list[str] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=dict)


class Lane:
    """First come, first served. Requests of one batch do not see each other's prefixes, later batches do."""

    def __init__(self, model: Model, limits: BatchLimits) -> None:
        self.model = model
        self.limits = limits
        self.queue: deque[Waiting] = deque()
        caching = limits.cache_tokens >= limits.page
        self.cache = BlockView(limits.cache_tokens, limits.page) if caching else None

    def push(self, request: Waiting) -> None:
        """Add a request at the end."""
        self.queue.append(request)

    def cut(self) -> Cut | None:
        """The next batch; None if nothing waits."""
        if not self.queue:
            return None
        limits, model = self.limits, self.model
        cut = Cut(Batch())
        chains: list[Sequence[int]] = []
        computing: set[int] = set()
        held_back: list[Waiting] = []
        while self.queue and cut.work.flops < limits.flops:
            request = self.queue[0]
            if limits.holds_back and self._waits_for(request, computing):
                held_back.append(self.queue.popleft())
                continue
            if not request.begun:
                request.begun = True
                request.found = request.done = self._held(request)
                cut.cached[request.rid] = request.found
            new = request.length - request.done
            room = limits.tokens - cut.work.tokens
            if new > room:
                if limits.chunk and room > 0:
                    cut.work.add(model, room, request.done, logits=0)
                    request.done += room
                    break
                if cut.work.tokens:
                    break
            self.queue.popleft()
            cut.work.add(model, new, request.done)
            cut.finished.append(request.rid)
            cut.cached[request.rid] = request.found
            chains.append(request.chain)
            if limits.holds_back:
                computing.update(request.chain[request.found // limits.page :])
        self.queue.extendleft(reversed(held_back))
        if self.cache is not None:
            for chain in chains:
                self.cache.insert_chain(0, tuple(chain))
        return cut

    def _waits_for(self, request: Waiting, computing: set[int]) -> bool:
        """Whether the first page that the request would compute is one that the batch computes already."""
        if request.begun:
            return False
        at = self._held(request) // self.limits.page
        return at < len(request.chain) and request.chain[at] in computing

    def _held(self, request: Waiting) -> int:
        if self.cache is None:
            return 0
        page = self.limits.page
        return min(self.cache.match_chain(request.chain).longest, (request.length - 1) // page * page)
