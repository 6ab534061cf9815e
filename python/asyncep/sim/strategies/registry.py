"""The strategies that are simulated, by name; those that the runtime serves have the runtime's names.

ASAP and AMoE keep no lanes (`disaggregated.py`): they are simulated on a backlog, and are not here yet.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncep.sim.errors import DataError, DoesNotFit
from asyncep.sim.memory import Shares
from asyncep.sim.strategies.coupled import CollectiveGather, DataParallelExperts
from asyncep.sim.strategies.expert_calls import ExpertCalls, Neighbours
from asyncep.sim.strategies.independent import OneSidedGather
from asyncep.sim.strategies.single import ExpertParallel, PipelineParallel, TensorParallel

if TYPE_CHECKING:
    from asyncep.sim.hardware import Cluster
    from asyncep.sim.kernels import Kernels
    from asyncep.sim.skew import ExpertSkew
    from asyncep.sim.strategies.base import Executor
    from asyncep.sim.work import Model

logger = logging.getLogger("asyncep")


@dataclass(frozen=True)
class Site:
    """What a strategy runs on.

    Attributes:
        kernels: seconds of the model's layers on one device.
        cluster: devices and links.
        ranks: devices of a group.
        skew: how unevenly tokens choose experts.
        overlap: share of expert parallelism's exchanges hidden.
        depth: gathered layers held.
        t_ep: seconds of a layer's gather; 0 for a strategy that gathers nothing.
    """

    kernels: Kernels
    cluster: Cluster
    ranks: int
    skew: ExpertSkew
    overlap: float
    depth: int
    t_ep: float


class Strategy(ABC):
    """How a model is spread over groups of devices. What is written here serves a strategy with whole ranks."""

    name: str
    gathers = False
    """Whether experts come from elsewhere, ahead of the computation."""
    independent = False
    """Whether each rank computes whole requests by itself."""
    divides_experts = True
    """Whether a model without experts leaves nothing to divide."""

    def ranks(self, group: int | None, cluster: Cluster) -> int:
        """Devices of a group when ``group`` is asked for; all of the cluster's by default."""
        return group or cluster.devices

    def check(self, model: Model, ranks: int) -> None:
        """Refuses what cannot be divided.

        Raises:
            DataError, DoesNotFit: with the reason.
        """
        if self.divides_experts and not model.experts and ranks > 1:
            raise DataError(f"{model.name}: a dense model has no experts for {self.name}")

    @abstractmethod
    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """What of the model each device of a group holds.

        Args:
            ranks: devices of a group.
            kv_split: share of a cached token's bytes where heads are divided.
            depth: gathered layers held.
        """

    def batch_tokens(self, tokens: int, ranks: int) -> int:
        """Of a batch of so many tokens, those whose activations one device holds."""
        del ranks
        return tokens

    @abstractmethod
    def executors(self, site: Site) -> list[Executor]:
        """Fresh ones for the whole cluster, one for each clock."""

    def batches_under_way(self, group: int) -> int:
        """Batches that a rank's router should keep there: the one it computes, and the next."""
        del group
        return 2

    def clocks_under_way(self, executor: Executor) -> int:
        """Batches that an executor computes at once."""
        return executor.lanes

    def groups(self, devices: int) -> Sequence[int]:
        """Sizes of groups that a planner should try."""
        return [group for group in _group_sizes(devices) if group > 1]

    def pointless(self, group: int, host_share: float) -> bool:
        """Whether another strategy is the same there."""
        del group, host_share
        return False


class Replicated(Strategy):
    """Each device holds everything and computes whole requests: data parallelism."""

    name = "replicated"
    independent = True
    divides_experts = False

    def ranks(self, group: int | None, cluster: Cluster) -> int:
        """One, whatever is asked for."""
        del group, cluster
        return 1

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """All of it."""
        del ranks, kv_split, depth
        return Shares(1, 1, 1)

    def executors(self, site: Site) -> list[Executor]:
        """Every device on its own."""
        return [OneSidedGather(site.kernels, 0.0, site.depth) for _ in range(site.cluster.devices)]

    def groups(self, devices: int) -> Sequence[int]:
        """One device."""
        del devices
        return [1]


class AsyncEP(Strategy):
    """Each device holds a part of the experts; the rest is read from the others while earlier layers compute."""

    name = "asyncep"
    gathers = True
    independent = True

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """All but the experts of others, which pass through slots."""
        del kv_split
        return Shares(1, 1 / ranks, 1, slots=depth, remote=1 - 1 / ranks)

    def executors(self, site: Site) -> list[Executor]:
        """Every device on its own clock."""
        return [
            OneSidedGather(site.kernels, site.t_ep, site.depth)
            for _ in range(site.cluster.devices // site.ranks * site.ranks)
        ]

    def groups(self, devices: int) -> Sequence[int]:
        """One device too, which takes its experts from the host."""
        return _group_sizes(devices)

    def pointless(self, group: int, host_share: float) -> bool:
        """One device that has all experts gathers nothing: that is `Replicated`."""
        return group == 1 and not host_share


class AsyncEPCollective(AsyncEP):
    """The same gathers as collectives, in which a group's devices wait for each other."""

    name = "asyncep-collective"
    independent = False

    def executors(self, site: Site) -> list[Executor]:
        """A clock for each group."""
        return [
            CollectiveGather(site.kernels, site.t_ep, site.ranks, site.depth)
            for _ in range(site.cluster.devices // site.ranks)
        ]


class Auto(AsyncEP):
    """The rest is read from the others where the computation hides it, and tokens travel where it does not."""

    name = "auto"

    def executors(self, site: Site) -> list[Executor]:
        """Every device on its own clock; it knows which of its group compute."""
        found: list[Executor] = []
        for _ in range(_groups_of(site)):
            group = Neighbours()
            link = site.cluster.inside if site.ranks <= site.cluster.per_node else site.cluster.between
            found += [
                ExpertCalls(site.kernels, site.t_ep, site.ranks, site.skew, link.latency, number, group)
                for number in range(site.ranks)
            ]
        return found

    def groups(self, devices: int) -> Sequence[int]:
        """A device alone has nobody to send to."""
        return [group for group in _group_sizes(devices) if group > 1]


class Tensor(Strategy):
    """Every product is divided over the group's devices."""

    name = "tp"
    divides_experts = False

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """A part of everything."""
        del depth
        return Shares(1 / ranks, 1 / ranks, kv_split, activation_split=ranks)

    def executors(self, site: Site) -> list[Executor]:
        """A clock for each group."""
        return [TensorParallel(site.kernels, site.cluster, site.ranks) for _ in range(_groups_of(site))]


class Pipelined(Strategy):
    """Layers are divided over the group's devices."""

    name = "pp"
    divides_experts = False

    def check(self, model: Model, ranks: int) -> None:
        """A stage needs a layer."""
        if ranks > model.layers:
            raise DoesNotFit(f"{model.name}: {model.layers} layers cannot be divided over {ranks} stages")

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """The layers of a stage."""
        del kv_split, depth
        return Shares(1 / ranks, 1 / ranks, 1 / ranks)

    def executors(self, site: Site) -> list[Executor]:
        """A clock for each group."""
        return [PipelineParallel(site.kernels, site.cluster, site.ranks) for _ in range(_groups_of(site))]

    def batches_under_way(self, group: int) -> int:
        """One for every stage, and the next."""
        return group + 1

    def clocks_under_way(self, executor: Executor) -> int:
        """One for every stage."""
        return executor.devices


class Expert(Strategy):
    """Experts are divided over the group's devices, and all else with tensor parallelism."""

    name = "ep"

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """A part of everything."""
        del depth
        return Shares(1 / ranks, 1 / ranks, kv_split)

    def batch_tokens(self, tokens: int, ranks: int) -> int:
        """Tokens are divided too."""
        return tokens // ranks

    def executors(self, site: Site) -> list[Executor]:
        """A clock for each group."""
        return [
            ExpertParallel(site.kernels, site.cluster, site.ranks, site.skew, site.overlap)
            for _ in range(_groups_of(site))
        ]


class DataAttention(Strategy):
    """Each device attends to its own requests; experts are divided, and tokens travel to them."""

    name = "dp-ep"

    def shares(self, ranks: int, kv_split: float, depth: int) -> Shares:
        """All but the experts of others."""
        del kv_split, depth
        return Shares(1, 1 / ranks, 1)

    def executors(self, site: Site) -> list[Executor]:
        """A clock for each group."""
        return [
            DataParallelExperts(site.kernels, site.cluster, site.ranks, site.skew, site.overlap)
            for _ in range(_groups_of(site))
        ]


# In the order in which a planner prefers what is equally good.
_ALL: tuple[Strategy, ...] = (
    AsyncEP(),
    Replicated(),
    Auto(),
    Tensor(),
    Pipelined(),
    Expert(),
    DataAttention(),
    AsyncEPCollective(),
)
NAMES: tuple[str, ...] = tuple(strategy.name for strategy in _ALL)
PROPOSED: tuple[str, ...] = tuple(name for name in NAMES if name not in (AsyncEPCollective.name, Auto.name))
"""What a planner weighs. AsyncEP by collectives is left out because it is only a baseline of AsyncEP, and `auto`
because the runtime serves it on CPUs only."""
BASELINES: tuple[str, ...] = (Tensor.name, Pipelined.name, Expert.name, DataAttention.name)
"""Distributed baselines that need no more memory than AsyncEP."""
# For one version.
_OLD_NAMES = {"dp": Replicated.name}


def find(name: str) -> Strategy:
    """The strategy of a name.

    Raises:
        DataError: there is none.
    """
    if name in _OLD_NAMES:
        logger.warning("strategy %r is now called %r", name, _OLD_NAMES[name])
        name = _OLD_NAMES[name]
    for strategy in _ALL:
        if strategy.name == name:
            return strategy
    raise DataError(f"strategy {name!r}: known are {', '.join(NAMES)}")


def _groups_of(site: Site) -> int:
    return site.cluster.devices // site.ranks


def _group_sizes(devices: int) -> list[int]:
    """Powers of two, and all devices, that divide the devices."""
    sizes = [group for group in range(1, devices + 1) if devices % group == 0]
    return [group for group in sizes if group & (group - 1) == 0 or group == devices]
