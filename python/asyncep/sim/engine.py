"""Runs requests through placement and executors to the end, event by event at the level of batches.

The router's own policy places requests: a `RoutingPolicy`, or one of `baselines`. Lanes only execute. Within a batch
the executors compute in closed form or by exact recurrences.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import simpy

from asyncep.sim.deployment import Deployment
from asyncep.sim.errors import SimulationError
from asyncep.sim.lane import BatchLimits, Cut, Lane, Waiting
from asyncep.sim.strategies import Executor
from asyncep.sim.work import Model
from asyncep.sim.workloads import TimedPrompt
from asyncep_router.baselines import BaselinePolicy, RoundRobin
from asyncep_router.block_chain import block_chain
from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.messages import BatchReport, Request
from asyncep_router.policy import Policy
from asyncep_router.routing_policy import RoutingPolicy


class Placed(NamedTuple):
    """Where a prompt was computed, and how many of its tokens that lane found in its cache."""

    lane: int
    cached: int


@dataclass(frozen=True)
class Fleet:
    """What executes.

    Attributes:
        executors: fresh ones, one for each clock.
        model: counts the FLOPs of a batch.
        limits: of each lane.
        peak: FLOP/s of all devices together, for the MFU.
        devices: in use.
    """

    executors: Sequence[Executor]
    model: Model
    limits: BatchLimits
    peak: float
    devices: int

    @classmethod
    def of(cls, deployment: Deployment) -> Fleet:
        """A deployment's devices."""
        peak = deployment.devices * deployment.cluster.device.peak[deployment.model.dtype]
        return cls(deployment.make(), deployment.model, deployment.limits, peak, deployment.devices)


@dataclass(frozen=True)
class Result:
    """What a run showed. `flops`: really computed, cached prefixes not. `stalled`: share of device-seconds spent
    waiting for weights. `imbalance`: largest over mean FLOPs of a lane. Latencies: seconds from arrival to the
    batch's end. `placed`: for `redundancy.Redundancy.judge`.
    """

    requests: int
    tokens: int
    makespan: float
    flops: float
    cached_share: float
    batches: int
    mean_batch_tokens: float
    stalled: float
    imbalance: float
    p50: float
    p99: float
    mfu: float
    placed: tuple[Placed, ...] = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """All but the list of placements, for a record."""
        return {name: value for name, value in vars(self).items() if name != "placed"}

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens answered a second, cached ones included."""
        return self.tokens / self.makespan

    @property
    def requests_per_second(self) -> float:
        """Requests answered a second."""
        return self.requests / self.makespan


class _Clock:
    """An executor with its lanes."""

    def __init__(self, run: _Run, executor: Executor, first: int) -> None:
        self.run_ = run
        self.executor = executor
        self.first = first
        self.lanes = [Lane(run.fleet.model, run.fleet.limits) for _ in range(executor.lanes)]
        self.flops = [0.0] * executor.lanes
        self.stalled = 0.0
        self.batches = 0
        self.tokens = 0
        self.arrived = run.env.event()

    def push(self, lane: int, request: Waiting) -> None:
        self.lanes[lane].push(request)
        if not self.arrived.triggered:
            self.arrived.succeed()

    def process(self) -> Generator[simpy.Event, None, None]:
        env = self.run_.env
        while True:
            while not any(lane.queue for lane in self.lanes):
                self.arrived = env.event()
                yield self.arrived
            # Several lanes start together: let what arrives at this very moment be dispatched first.
            yield env.timeout(0)
            cuts = [lane.cut() for lane in self.lanes]
            outcome = self.executor.run(env.now, [cut.work if cut else None for cut in cuts])
            self.stalled += outcome.stalled
            for lane, (cut, end) in enumerate(zip(cuts, outcome.ends, strict=True)):
                if cut is None or end is None:
                    continue
                self.flops[lane] += cut.work.flops
                self.batches += 1
                self.tokens += cut.work.tokens
                env.process(self.run_.finish(self.first + lane, cut, env.now, end))
            yield env.timeout(max(0.0, outcome.ready - env.now))


class _Run:
    def __init__(self, fleet: Fleet, prompts: Sequence[TimedPrompt], policy: Policy | None) -> None:
        self.env = simpy.Environment()
        self.fleet = fleet
        self.prompts = prompts
        self.clocks: list[_Clock] = []
        self.where: list[tuple[_Clock, int]] = []
        for executor in fleet.executors:
            clock = _Clock(self, executor, len(self.where))
            self.clocks.append(clock)
            self.where.extend((clock, lane) for lane in range(executor.lanes))
        self.policy: Policy = policy or BaselinePolicy(RoundRobin, ranks=len(self.where))
        self.latencies: list[float] = []
        self.arrival: dict[str, float] = {}
        self.placed: dict[str, Placed] = {}
        self.last = 0.0
        self._alarm = float("inf")

    def finish(self, rank: int, cut: Cut, start: float, end: float) -> Generator[simpy.Event, None, None]:
        yield self.env.timeout(max(0.0, end - self.env.now))
        now = self.env.now
        self.last = max(self.last, now)
        if not cut.finished:
            return
        for rid in cut.finished:
            self.latencies.append(now - self.arrival.pop(rid))
            self.placed[rid] = Placed(rank, cut.cached[rid])
        self.policy.report(BatchReport(rank, tuple(cut.finished), cut.work.flops, end - start, cut.cached), now)
        self.dispatch()

    def dispatch(self) -> None:
        page = self.fleet.limits.page
        for dispatch in self.policy.poll(self.env.now):
            clock, lane = self.where[dispatch.rank]
            tokens = dispatch.request.token_ids
            chain = block_chain(tokens, page) if clock.lanes[lane].cache is not None else ()
            clock.push(lane, Waiting(dispatch.rid, len(tokens), chain))
        wakeup = self.policy.next_wakeup(self.env.now)
        if wakeup is not None and (wakeup < self._alarm or self._alarm <= self.env.now):
            self._alarm = wakeup
            self.env.process(self._ring(wakeup))

    def _ring(self, at: float) -> Generator[simpy.Event, None, None]:
        yield self.env.timeout(max(0.0, at - self.env.now))
        self.dispatch()

    def arrivals(self) -> Generator[simpy.Event, None, None]:
        position = 0
        while position < len(self.prompts):
            arrival = self.prompts[position].arrival
            if arrival > self.env.now:
                yield self.env.timeout(arrival - self.env.now)
            now = self.env.now
            while position < len(self.prompts) and self.prompts[position].arrival <= now:
                prompt = self.prompts[position]
                rid = f"r{position}"
                self.arrival[rid] = prompt.arrival
                self.policy.submit(Request(rid, prompt.token_ids, prompt.arrival), now)
                position += 1
            self.dispatch()

    def run(self) -> Result:
        self.env.process(self.arrivals())
        for clock in self.clocks:
            self.env.process(clock.process())
        self.env.run()
        if len(self.latencies) != len(self.prompts):
            raise SimulationError(f"{len(self.prompts) - len(self.latencies)} requests never finished")
        ordered = sorted(self.latencies)
        lanes = [flops for clock in self.clocks for flops in clock.flops]
        flops, batches = sum(lanes), sum(clock.batches for clock in self.clocks)
        tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        placed = tuple(self.placed[f"r{position}"] for position in range(len(self.prompts)))
        return Result(
            requests=len(self.prompts),
            tokens=tokens,
            makespan=self.last,
            flops=flops,
            cached_share=sum(one.cached for one in placed) / tokens,
            batches=batches,
            mean_batch_tokens=sum(clock.tokens for clock in self.clocks) / batches,
            stalled=sum(clock.stalled for clock in self.clocks) / (self.last * self.fleet.devices),
            imbalance=max(lanes) * len(lanes) / flops,
            p50=ordered[len(ordered) // 2],
            p99=ordered[int(len(ordered) * 0.99)],
            mfu=flops / (self.last * self.fleet.peak),
            placed=placed,
        )


def frontend(deployment: Deployment, lanes: int, **limits: Any) -> RoutingPolicy:
    """The router's policy for a deployment: its T, its caches. `limits` are `Limits`' fields.

    A pipeline needs a batch for every stage, and the next one, where a rank needs two.
    """
    page = deployment.limits.page
    under_way = deployment.kind.batches_under_way(deployment.group)
    settings: dict[str, Any] = {"block": page, "inflight_target": under_way, **limits}
    policy = RoutingPolicy(deployment.model.cost, BlockView(1 << 40, page), Limits(**settings))
    for rank in range(lanes):
        caches = deployment.limits.cache_tokens >= page
        policy.rank_joined(
            rank,
            caches=caches,
            cache_tokens=deployment.limits.cache_tokens if caches else None,
            gathers=deployment.kind.gathers,
        )
        policy.set_threshold(rank, deployment.threshold)
    return policy


def simulate(fleet: Fleet | Deployment, prompts: Sequence[TimedPrompt], policy: Policy | None = None) -> Result:
    """Runs prompts (in order of arrival) to the end.

    Args:
        fleet: what executes.
        prompts: at least one.
        policy: of the fleet's lanes; round robin by default.

    Raises:
        SimulationError: no prompts, or some never finish.
    """
    if not prompts:
        raise SimulationError("no requests to simulate")
    return _Run(Fleet.of(fleet) if isinstance(fleet, Deployment) else fleet, prompts, policy).run()


def simulate_routed(deployment: Deployment, prompts: Sequence[TimedPrompt], **limits: Any) -> Result:
    """The same with the router's own policy placing requests."""
    fleet = Fleet.of(deployment)
    lanes = sum(executor.lanes for executor in fleet.executors)
    return simulate(fleet, prompts, frontend(deployment, lanes, **limits))
