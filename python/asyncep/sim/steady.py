"""Throughput while work never runs out: equal batches, one after the other, no router.

Cheap enough to be bisected over. What it leaves out is what placement decides: unequal ranks, the first and the last
batches. `engine.py` has those.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from asyncep.sim.deployment import Deployment
from asyncep.sim.work import Batch, Model
from asyncep.sim.workloads import TimedPrompt
from asyncep_router.block_chain import block_chain
from asyncep_router.block_view import BlockView


@dataclass(frozen=True)
class Profile:
    """A workload's average request. `work`: all of its passes as one batch; `prompt_tokens`: with cached ones."""

    model: Model
    work: Batch
    prompt_tokens: int
    longest: int

    @classmethod
    def of(cls, model: Model, prompts: Iterable[TimedPrompt], page: int = 64) -> Profile:
        """With an endless prefix cache: what prompts share is computed once. Raises `ValueError` without prompts."""
        cache = BlockView(1 << 62, page)
        work, total, longest = Batch(), 0, 0
        for prompt in prompts:
            chain = block_chain(prompt.token_ids, page)
            length = len(prompt.token_ids)
            held = min(cache.match_chain(chain).longest, (length - 1) // page * page)
            work.add(model, length - held, held)
            cache.insert_chain(0, chain)
            total += length
            longest = max(longest, length)
        if not work.tokens:
            raise ValueError("no prompts")
        return cls(model, work, total, longest)

    @property
    def cached_share(self) -> float:
        """Share of prompt tokens found in the cache."""
        return 1 - self.work.tokens / self.prompt_tokens

    @property
    def mean_length(self) -> float:
        """Tokens of a prompt, cached ones included."""
        return self.prompt_tokens / self.work.requests

    def batch(self, tokens: int) -> Batch:
        """A batch of `tokens` new tokens, of this mix."""
        factor = tokens / self.work.tokens
        return Batch(
            tokens=tokens,
            requests=max(1, round(self.work.requests * factor)),
            logits=max(1, round(self.work.logits * factor)),
            cached=round(self.work.cached * factor),
            flops=self.work.flops * factor,
            pairs=[pairs * factor for pairs in self.work.pairs],
            pairs_by_length=[pairs * factor for pairs in self.work.pairs_by_length],
        )


@dataclass(frozen=True)
class Steady:
    """`tokens_per_second`: prompt tokens answered by all devices, cached ones included. `step`: seconds between the
    ends of two batches of a lane. `latency`: seconds a batch is under way. `stalled`: share of the time
    spent waiting for weights."""

    tokens_per_second: float
    requests_per_second: float
    mfu: float
    step: float
    latency: float
    stalled: float
    lane_tokens: int


def steady(deployment: Deployment, profile: Profile, tokens: int) -> Steady:
    """`tokens`: new tokens of each lane's batch."""
    executors = deployment.make()
    executor = executors[0]
    batch = profile.batch(tokens)
    # Until a pipeline is full; what keeps one clock is steady at once.
    under_way = deployment.kind.clocks_under_way(executor) // executor.lanes
    rounds = 3 * under_way + 3 if under_way > 1 else 4
    ready, last, before, stalled, latency = 0.0, 0.0, 0.0, 0.0, 0.0
    for _ in range(rounds):
        start = ready
        outcome = executor.run(ready, [batch] * executor.lanes)
        ready, stalled = outcome.ready, outcome.stalled
        before, last = last, max(end for end in outcome.ends if end is not None)
        latency = last - start
    step = last - before
    done = executor.lanes * batch.tokens / step * len(executors)
    flops = executor.lanes * batch.flops / step * len(executors)
    device = deployment.cluster.device
    prompt = done / (1 - profile.cached_share)
    return Steady(
        tokens_per_second=prompt,
        requests_per_second=prompt / profile.mean_length,
        mfu=flops / (deployment.devices * device.peak[deployment.model.dtype]),
        step=step,
        latency=latency,
        stalled=stalled / (step * executor.devices),
        lane_tokens=batch.tokens,
    )
