"""Chooses strategy, group and batch by simulated throughput, and finds what would change the choice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from asyncep.sim.deployment import Deployment, Settings, deploy
from asyncep.sim.errors import DataError, DoesNotFit
from asyncep.sim.hardware import Cluster, Link
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.steady import Profile, Steady, steady
from asyncep.sim.strategies.registry import PROPOSED, find
from asyncep.sim.work import Model

BATCHES = tuple(1 << power for power in range(10, 18))
"""Tokens of a lane's batch that are tried."""
NEAR = 0.97
"""What reaches this share of the best throughput counts as equally fast; of those, what answers sooner is taken."""
KV_FREE_BELOW = 0.02
"""Without this share of cached tokens no cache is kept."""
CACHE_TOKENS = 65_536
"""Cache a rank should have room for when prompts share anything."""


@dataclass(frozen=True)
class Option:
    """A strategy with the group and batch that suit it best."""

    deployment: Deployment
    result: Steady

    @property
    def strategy(self) -> str:
        return self.deployment.strategy


@dataclass(frozen=True)
class Refusal:
    """A strategy that cannot run, and why."""

    strategy: str
    reason: str


@dataclass(frozen=True)
class Change:
    """Where another strategy would win. `at`: value of `quantity` nearest to today's `now` from which on it is faster;
    None: nowhere between `low` and `high`."""

    strategy: str
    quantity: str
    unit: str
    now: float
    at: float | None
    low: float
    high: float


@dataclass(frozen=True)
class Plan:
    """`options`: the choice, then the others, fastest first. `refused`: what does not fit. `changes`: what would
    have to change for another to win."""

    options: tuple[Option, ...]
    refused: tuple[Refusal, ...]
    changes: tuple[Change, ...]
    kv_free: bool

    @property
    def best(self) -> Option:
        return self.options[0]


@dataclass(frozen=True)
class Planner:
    """What is given: model, cluster, workload, skew, and the batch a lane may have at most."""

    model: Model
    cluster: Cluster
    profile: Profile
    skew: ExpertSkew
    most_tokens: int = BATCHES[-1]

    def plan(self) -> Plan:
        """Raises `DoesNotFit` if nothing does."""
        options, refused = [], []
        for strategy in PROPOSED:
            try:
                options.append(self._best(strategy))
            except (DoesNotFit, DataError) as error:
                refused.append(Refusal(strategy, str(error)))
        if not options:
            raise DoesNotFit("".join(f"\n  {refusal.strategy}: {refusal.reason}" for refusal in refused))
        options.sort(key=lambda option: -option.result.tokens_per_second)
        most = options[0].result.tokens_per_second
        near = [option for option in options if option.result.tokens_per_second >= NEAR * most]
        best = min(near, key=lambda option: (option.result.latency, PROPOSED.index(option.strategy)))
        options.remove(best)
        options.insert(0, best)
        return Plan(tuple(options), tuple(refused), tuple(self._changes(options)), self.kv_free)

    @property
    def kv_free(self) -> bool:
        """Whether no prefix cache is worth keeping."""
        return self.profile.cached_share < KV_FREE_BELOW

    def _settings(self, tokens: int, *, whole: bool) -> Settings:
        # In KV-free mode a prompt is never divided, so the longest one has to fit.
        free = self.kv_free and whole
        return Settings(
            batch_tokens=max(tokens, self.profile.longest) if free else tokens,
            kv_free=free,
            kv_tokens=max(CACHE_TOKENS if not self.kv_free else 0, self.profile.longest),
        )

    def _evaluate(self, strategy: str, group: int, tokens: int, cluster: Cluster) -> Option:
        settings = self._settings(tokens, whole=find(strategy).independent)
        deployment = deploy(strategy, self.model, cluster, group=group, skew=self.skew, settings=settings)
        return Option(deployment, steady(deployment, self.profile, tokens))

    def _best(self, strategy: str) -> Option:
        """Over groups and batches; raises the last refusal if none fits."""
        found: list[Option] = []
        error: DoesNotFit | DataError | None = None
        for group in find(strategy).groups(self.cluster.devices):
            for tokens in self._batches():
                try:
                    option = self._evaluate(strategy, group, tokens, self.cluster)
                except (DoesNotFit, DataError) as refusal:
                    error = refusal
                    break  # more tokens need more memory
                memory = option.deployment.memory
                if memory and find(strategy).pointless(group, memory.host_share):
                    continue
                found.append(option)
        if not found:
            raise error or DoesNotFit(f"{strategy}: nothing to divide over {self.cluster.devices} device(s)")
        most = max(option.result.tokens_per_second for option in found)
        near = [option for option in found if option.result.tokens_per_second >= NEAR * most]
        return min(near, key=_preference)

    def _batches(self) -> list[int]:
        kept = [tokens for tokens in BATCHES if tokens <= self.most_tokens]
        return kept or [self.most_tokens]

    def _changes(self, options: list[Option]) -> Iterator[Change]:
        best = options[0]
        link = self._link(best)
        for other in options[1:]:
            yield self._crossing(
                other.strategy,
                "link",
                "GB/s",
                link.bandwidth / 1e9,
                lambda value, other=other: self._gap(best, other, link=value * 1e9),  # type: ignore[misc]
                1000.0,
            )
            now = self._backlog(best)
            yield self._crossing(
                other.strategy,
                "tokens under way",
                "tokens",
                now,
                lambda value, other=other: self._gap(best, other, backlog=value),  # type: ignore[misc]
                4096.0,
            )

    def _link(self, option: Option) -> Link:
        return self.cluster.inside if option.deployment.group <= self.cluster.per_node else self.cluster.between

    def _backlog(self, option: Option) -> float:
        """New tokens in execution at once on all devices."""
        return option.result.lane_tokens * _lanes(option.deployment)

    def _gap(self, best: Option, other: Option, *, link: float | None = None, backlog: float | None = None) -> float:
        """How far the other is ahead of the best (tokens/s, counting only what exceeds equally fast), both as they are
        but for one thing. nan where either cannot run."""
        speeds = []
        for option in (best, other):
            cluster = self.cluster
            tokens = option.result.lane_tokens
            if link is not None:
                factor = link / self._link(best).bandwidth
                cluster = replace(
                    cluster, inside=_faster(cluster.inside, factor), between=_faster(cluster.between, factor)
                )
            if backlog is not None:
                tokens = max(1, round(backlog / _lanes(option.deployment)))
            try:
                changed = self._evaluate(option.strategy, option.deployment.group, tokens, cluster)
            except (DoesNotFit, DataError):
                return math.nan
            speeds.append(changed.result.tokens_per_second)
        return NEAR * speeds[1] - speeds[0]

    def _crossing(
        self, strategy: str, quantity: str, unit: str, now: float, gap: Callable[[float], float], reach: float
    ) -> Change:
        """The value nearest to `now`, up to `reach` times more or less, where `gap` becomes positive."""
        low, high = now / reach, now * reach
        nearest: float | None = None
        for direction in (-1, 1):
            previous = now
            for step in range(1, 17):
                value = now * reach ** (direction * step / 16)
                if gap(value) > 0:
                    found = _bisect(gap, previous, value)
                    if nearest is None or abs(math.log(found / now)) < abs(math.log(nearest / now)):
                        nearest = found
                    break
                previous = value
        return Change(strategy, quantity, unit, now, nearest, low, high)


def _bisect(gap: Callable[[float], float], lost: float, won: float) -> float:
    """Between a value where the gap is not positive and one where it is, to 1 %."""
    while abs(math.log(won / lost)) > 0.01:
        middle = math.sqrt(lost * won)
        lost, won = (lost, middle) if gap(middle) > 0 else (middle, won)
    return won


def _preference(option: Option) -> tuple[float, ...]:
    """Of options about equally fast: the smaller batch, then less in host memory, then the smaller group."""
    memory = option.deployment.memory
    return option.result.lane_tokens, memory.host_share if memory else 0.0, option.deployment.group


def _lanes(deployment: Deployment) -> int:
    """Batches in execution at once."""
    executors = deployment.make()
    return len(executors) * deployment.kind.clocks_under_way(executors[0])


def _faster(link: Link, factor: float) -> Link:
    return replace(link, bandwidth=link.bandwidth * factor)
