"""A simulation of ranks that execute batches, to judge placement without a device (needs `simpy`).

A rank takes requests from its queue in order until the batch reaches `batch_flops` net of what its own
cache holds, and then computes it. Its cache is a `BlockView` of bounded size, filled when a batch ends:
requests of one batch do not see each other's prefixes, as in SGLang, unless `holds_back` is set, which
leaves a request whose prefix is being computed in the batch for the next one.

AsyncEP: while a layer computes, the next layer's experts are gathered; so a batch takes, per layer, the
longer of its compute and t_EP. Below T the gather is exposed and a batch takes as long as one of T.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import simpy

from asyncep_router.block_chain import block_chain
from asyncep_router.block_view import BlockView
from asyncep_router.messages import BatchReport, Dispatch, Request

if TYPE_CHECKING:
    from array import array
    from collections.abc import Generator, Sequence

    from asyncep.sim.workloads import TimedPrompt
    from asyncep_router.cost import ModelCost
    from asyncep_router.policy import Policy


@dataclass(frozen=True)
class RankModel:
    """The device behind a rank.

    `flops_per_second`: achieved on this model. `gather_seconds`: t_EP, a layer. `batch_flops`: net FLOPs
    of a pass at which the scheduler cuts a batch. `cache_tokens`: size of the KV cache. `page`: its pages,
    tokens. `overhead`: seconds a batch costs besides.
    """

    flops_per_second: float
    gather_seconds: float
    batch_flops: float
    cache_tokens: int
    page: int = 32
    overhead: float = 0.0
    holds_back: bool = False


@dataclass(frozen=True)
class Result:
    """What a run showed. FLOPs are those really computed, by the ranks' own caches.

    `cached_share`: cached over prompt tokens. `prefix_ratio`: tokens computed inside the workload's shared
    prefixes over those of computing each once (1.0 is the lower bound; nan without shared prefixes).
    `flops_ratio`: all FLOPs over the bound in which everything shared, by whole pages, is computed once.
    `imbalance`: largest over mean FLOPs of a rank. Latencies in seconds from arrival to the batch's end.
    """

    requests: int
    makespan: float
    cached_share: float
    prefix_ratio: float
    flops_ratio: float
    imbalance: float
    p50: float
    p99: float
    batches: int
    exposed_share: float
    """Share of the ranks' busy time spent waiting for weights."""

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return self.requests / self.makespan


class _Rank:
    def __init__(self, sim: _Simulation, index: int) -> None:
        self.sim = sim
        self.index = index
        self.queue: deque[Dispatch] = deque()
        self.cache = BlockView(sim.model.cache_tokens, sim.model.page)
        self.arrived = sim.env.event()
        self.flops = 0
        self.busy = 0.0
        self.exposed = 0.0
        self.batches = 0

    def push(self, dispatch: Dispatch) -> None:
        self.queue.append(dispatch)
        if not self.arrived.triggered:
            self.arrived.succeed()

    def run(self) -> Generator[simpy.Event, None, None]:
        sim = self.sim
        while True:
            while not self.queue:
                self.arrived = sim.env.event()
                yield self.arrived
            batch, flops, cached = self._cut()
            compute = flops / sim.model.flops_per_second
            seconds = max(compute, sim.model.gather_seconds * len(sim.cost.shape.layers))
            seconds += sim.model.overhead
            self.exposed += seconds - compute - sim.model.overhead
            self.busy += seconds
            self.flops += flops
            self.batches += 1
            yield sim.env.timeout(seconds)
            for dispatch in batch:
                self.cache.insert_chain(0, sim.chains[dispatch.rid])
                sim.latencies.append(sim.env.now - dispatch.request.arrival)
            sim.ended = sim.env.now
            rids = tuple(dispatch.rid for dispatch in batch)
            sim.policy.report(BatchReport(self.index, rids, flops, seconds, cached), sim.env.now)
            sim.dispatch()

    def _cut(self) -> tuple[list[Dispatch], int, dict[str, int]]:
        """The next batch, its FLOPs, and cached tokens by request."""
        sim = self.sim
        batch: list[Dispatch] = []
        left: list[Dispatch] = []
        flops = 0
        cached: dict[str, int] = {}
        computing: set[int] = set()
        while self.queue and flops < sim.model.batch_flops:
            dispatch = self.queue.popleft()
            chain = sim.chains[dispatch.rid]
            length = len(dispatch.request.token_ids)
            held = min(self.cache.match_chain(chain).longest, (length - 1) // sim.model.page * sim.model.page)
            nxt = held // sim.model.page
            if sim.model.holds_back and nxt < len(chain) and chain[nxt] in computing:
                left.append(dispatch)
                continue
            computing.update(chain[nxt:])
            batch.append(dispatch)
            cached[dispatch.rid] = held
            flops += sim.cost.flops(length - held, held)
            sim.computed(dispatch, held)
        self.queue.extendleft(reversed(left))
        return batch, flops, cached


class _Simulation:
    def __init__(
        self, prompts: Sequence[TimedPrompt], policy: Policy, ranks: int, model: RankModel, cost: ModelCost
    ) -> None:
        self.env = simpy.Environment()
        self.prompts = prompts
        self.policy = policy
        self.model = model
        self.cost = cost
        self.requests = {
            f"r{i}": Request(f"r{i}", prompt.token_ids, prompt.arrival) for i, prompt in enumerate(prompts)
        }
        self.by_rid = {f"r{i}": prompt for i, prompt in enumerate(prompts)}
        self.chains = {rid: block_chain(p.token_ids, model.page) for rid, p in self.by_rid.items()}
        self.latencies: list[float] = []
        self.ended = 0.0  # the clock itself runs on to the last alarm
        self.cached_tokens = 0
        self.prefix_tokens = 0
        self.ranks = [_Rank(self, index) for index in range(ranks)]
        self._alarm = float("inf")

    def computed(self, dispatch: Dispatch, held: int) -> None:
        self.cached_tokens += held
        self.prefix_tokens += max(0, _whole(self.by_rid[dispatch.rid].shared, self.model.page) - held)

    def dispatch(self) -> None:
        """Ask the policy, hand out what it says, and set an alarm for when it wants to be asked again."""
        for dispatch in self.policy.poll(self.env.now):
            self.ranks[dispatch.rank].push(dispatch)
        wakeup = self.policy.next_wakeup(self.env.now)
        if wakeup is not None and (wakeup < self._alarm or self._alarm <= self.env.now):
            self._alarm = wakeup
            self.env.process(self._ring(wakeup))

    def _ring(self, at: float) -> Generator[simpy.Event, None, None]:
        yield self.env.timeout(max(0.0, at - self.env.now))
        self.dispatch()

    def arrivals(self) -> Generator[simpy.Event, None, None]:
        requests = iter(self.requests.values())
        request = next(requests, None)
        while request is not None:
            if request.arrival > self.env.now:
                yield self.env.timeout(request.arrival - self.env.now)
            now = self.env.now
            while request is not None and request.arrival <= now:
                self.policy.submit(request, now)
                request = next(requests, None)
            self.dispatch()

    def run(self) -> Result:
        self.env.process(self.arrivals())
        for rank in self.ranks:
            self.env.process(rank.run())
        self.env.run()
        if len(self.latencies) != len(self.prompts):
            raise RuntimeError(f"{len(self.prompts) - len(self.latencies)} requests never finished")
        ordered = sorted(self.latencies)
        flops = [rank.flops for rank in self.ranks]
        tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        once = shared_once(self.prompts, self.model.page)
        return Result(
            requests=len(self.prompts),
            makespan=self.ended,
            cached_share=self.cached_tokens / tokens,
            prefix_ratio=self.prefix_tokens / once if once else float("nan"),
            flops_ratio=sum(flops) / lower_bound_flops(self.prompts, self.model.page, self.cost),
            imbalance=max(flops) * len(flops) / sum(flops),
            p50=ordered[len(ordered) // 2],
            p99=ordered[int(len(ordered) * 0.99)],
            batches=sum(rank.batches for rank in self.ranks),
            exposed_share=sum(rank.exposed for rank in self.ranks) / sum(rank.busy for rank in self.ranks),
        )


def simulate(prompts: Sequence[TimedPrompt], policy: Policy, ranks: int, model: RankModel, cost: ModelCost) -> Result:
    """Run prompts (in order of arrival) through a policy and `ranks` equal ranks to the end."""
    return _Simulation(prompts, policy, ranks, model, cost).run()


def shared_once(prompts: Sequence[TimedPrompt], page: int) -> int:
    """Tokens of all distinct shared prefixes, each counted once, in whole pages."""
    seen: set[int] = set()
    for prompt in prompts:
        seen.update(block_chain(_head(prompt), page))
    return len(seen) * page


def lower_bound_flops(prompts: Sequence[TimedPrompt], page: int, cost: ModelCost) -> int:
    """FLOPs if one endless cache served all prompts in order of arrival: nothing computed twice."""
    cache = BlockView(1 << 62, page)
    total = 0
    for prompt in prompts:
        chain = block_chain(prompt.token_ids, page)
        length = len(prompt.token_ids)
        held = min(cache.match_chain(chain).longest, _whole(length - 1, page))
        total += cost.flops(length - held, held)
        cache.insert_chain(0, chain)
    return total


def _head(prompt: TimedPrompt) -> array[int]:
    return prompt.token_ids[: prompt.shared]


def _whole(tokens: int, page: int) -> int:
    return tokens // page * page
