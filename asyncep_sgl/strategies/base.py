"""The contract of a strategy: how experts and tokens come together in a run.

A strategy has two sides. `Strategy` is the run's side: the launcher, the front, the router's process and each rank
make one from the run's configuration and ask it what they need. `RankStrategy` is a rank's side: the rank makes one
before its model is built, and every layer's experts are computed by it. Neither side imports SGLang; `plugin` and the
operators call them from SGLang's places.

What is written here serves: all experts in memory that every rank of the host reads, nothing moves. A strategy
overrides what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from asyncep_sgl.errors import UsageError

if TYPE_CHECKING:
    import torch
    from prometheus_client.registry import Collector

    from asyncep_kernels.attention.plan import Plan
    from asyncep_kernels.moe.table import ExpertTable
    from asyncep_router.cost import ModelCost
    from asyncep_sgl.config.options import ServeOptions
    from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig
    from asyncep_sgl.experts.shard.manager import ExpertManager
    from asyncep_sgl.experts.store.messages import Status


# --- the run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideProcess:
    """A process that the launcher starts beside the front, and starts again when it dies.

    The server ends if it keeps dying.

    Attributes:
        role: what it calls itself when it says hello, and what log lines call it; no other process has it.
        command: its command line.
    """

    role: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class FrontPlace:
    """What the front gives a strategy once it answers requests.

    Attributes:
        url: of the server.
        api_key: a key that every request of the server's own may carry.
        model: the model's Hugging Face configuration.
        context: tokens of the longest prompt.
        status: asks the launcher for the store and the gathers as they are now.
    """

    url: str
    api_key: str
    model: Mapping[str, Any]
    context: int
    status: Callable[[], Status]


class Strategy:
    """The run's side. One object a process; cheap to make, nothing is started by making it.

    Args:
        config: of the run.
    """

    name: ClassVar[str]

    def __init__(self, config: AsyncEPConfig) -> None:
        self.config = config

    # The launcher

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """Looks at the command line before anything is started.

        By default a run whose flags divide the experts is refused, because nothing here would bring the missing ones,
        and one with SGLang's own operators, which call no strategy.

        Args:
            options: the command line.
            group: how it spreads the experts.

        Raises:
            UsageError: it asks for what this strategy does not do; names flag and fix.
        """
        cls._refuse_divided(options, group)
        if options.run.kernels != "ours":
            raise UsageError(
                f"--asyncep-kernels {options.run.kernels}: SGLang's operators would not call the strategy "
                f"{options.run.strategy}; leave the flag out"
            )

    @classmethod
    def _refuse_divided(cls, options: ServeOptions, group: GroupConfig) -> None:
        """Refuses what spreads the experts beyond memory that every rank of this host reads."""
        asked = (
            ("--nnodes", options.group.nodes > 1),
            ("--asyncep-expert-memory", options.group.memory_limit is not None),
            ("--asyncep-transport pinned", options.run.transport == "pinned"),
        )
        for flag, given in asked:
            if given:
                raise UsageError(
                    f"--asyncep-strategy {options.run.strategy}: each host keeps all experts; leave {flag} out"
                )
        if group.divides:
            raise UsageError(
                f"--asyncep-strategy {options.run.strategy}: the experts are divided, because there are several GPUs "
                "or they do not fit into one; use asyncep"
            )

    def side_processes(self) -> Sequence[SideProcess]:
        """Processes beside the front."""
        return ()

    def environment(self, outside: Mapping[str, str]) -> Mapping[str, str]:
        """Variables for every process of the server, beyond those of the launcher's own environment ``outside``."""
        del outside
        return {}

    def sglang_flags(self) -> Sequence[str]:
        """Flags with their values for SGLang's command line, where the user's is silent. On GPUs they are not asked
        for: `asyncep_sgl.launcher.cuda_serving` has those."""
        return ()

    # The router

    @property
    def gathers(self) -> bool:
        """Whether a batch waits for weights: one below T FLOPs a layer then takes as long as one of T."""
        return False

    @property
    def may_stall(self) -> bool:
        """Whether a rank may wait for others for as long as they are away: one that does not move is not stuck then."""
        return False

    # The front

    def gates(self) -> Sequence[tuple[type[Any], Mapping[str, Any]]]:
        """ASGI middleware with its arguments, innermost first."""
        return ()

    def collectors(self, status: Callable[[], Status]) -> Sequence[Collector]:
        """What ``/metrics`` shows beyond the router's figures. Called for each answer, not before SGLang has set
        prometheus_client up."""
        del status
        return ()

    def first_work(self, place: FrontPlace) -> None:
        """Called once, when the front answers and before the server is said to be ready. May take its time."""

    # A rank

    def rank(self, place: RankPlace) -> RankStrategy:
        """The rank's side, in a rank's process."""
        return RankStrategy(place)


# --- a rank -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankPlace:
    """What a rank gives its strategy.

    Attributes:
        rank: within its host.
        config: of the run.
        experts: the rank's side of the expert store.
        cost: FLOPs of the model.
        folder: answers the folder of the checkpoint.
        device: answers the device that the rank computes on; None is a CPU. Asked once the model is loaded.
        tell_threshold: tells the router T, in FLOPs of a layer.
    """

    rank: int
    config: AsyncEPConfig
    experts: ExpertManager
    cost: ModelCost
    folder: Callable[[], str]
    device: Callable[[], torch.device | None]
    tell_threshold: Callable[[float], None]


class TopK(NamedTuple):
    """Where each of T tokens goes: ``ids`` ``(T, K)`` int32 experts, ``weights`` ``(T, K)`` fp32."""

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts, as the rank that computes them sees them.

    Attributes:
        index: the decoder layer.
        own: the layer's own parameters as a table; rows of experts that this rank does not hold have no contents.
        compute: runs the experts of a table over hidden states ``(T, H)``; gives ``(T, H)``. On this rank's device.
            Where that is a GPU it keeps each table's addresses: pass the same object for the same memory.
    """

    index: int
    own: ExpertTable
    compute: Callable[[torch.Tensor, TopK, ExpertTable], torch.Tensor]


class Attention(NamedTuple):
    """A layer's attention on a CPU: arguments of `asyncep_kernels.attention.cpu.attention`."""

    q: torch.Tensor
    """``(T, Hq, D)``."""
    k_cache: torch.Tensor
    """``(slots, Hkv, D)``, the new tokens' keys in it."""
    v_cache: torch.Tensor
    """``(slots, Hkv, Dv)``, likewise."""
    plan: Plan
    """Of the batch."""
    scale: float
    """Of the scores."""
    out: torch.Tensor
    """``(T, Hq, Dv)``, to be written."""


class RankStrategy:
    """A rank's side. For the one thread that computes.

    Order of calls: `adopt` for each layer while the model is built; `weights` and `reads` while it loads; `loaded`
    once; then for each batch `batch_flops`, `batch_begins`, `pass_begins`, the layers in order, `batch_done`. Where
    SGLang schedules ahead of a GPU, the next batch's `batch_flops` and `batch_begins` come before this one's
    `batch_done`.

    Args:
        place: the rank.

    Attributes:
        batch_flops: FLOPs at which a batch is closed and a longer prompt cut; None leaves batches to the tokens that
            SGLang and the router count. What it answers may change while serving.
        told: decoder layers around whose experts `layer_begins` and `layer_ended` are called; read after `loaded`.
    """

    def __init__(self, place: RankPlace) -> None:
        self.place = place
        self.batch_flops: Callable[[], float] | None = None
        self.told: Collection[int] = ()

    # The model

    def adopt(self, layer: int, experts: int, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """A layer's expert parameters have their shape, ``(experts, ...)`` each, and no contents yet.

        Raises:
            StoreError: a parameter does not hold all experts, or there is no memory for it.
        """
        self.place.experts.adopt(layer, experts, dict(parameters))

    def reads(self, layer: int, expert: int) -> bool:
        """Whether this rank takes an expert's tensors from the checkpoint.

        Raises:
            StoreError: the experts are in service and read-only.
        """
        self.place.experts.refuse_if_sealed()
        return expert in self.place.experts.owned(layer)

    def weights(self, files: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of safetensors files by name, without those of experts that this rank does not read."""
        return self.place.experts.weights().tensors(list(files))

    def loaded(self) -> None:
        """The rank has written what it reads. Returns when the rank can compute.

        Raises:
            StoreError, GatherError: it will not be able to; says why.
        """
        self.place.experts.finish()

    # Computing

    def in_place(self, layer: int) -> bool:
        """Whether SGLang's own operator may compute a layer that our kernels do not serve: its own parameters hold all
        of its experts, and `moe` does nothing of its own."""
        del layer
        return type(self).moe is RankStrategy.moe

    def moe(self, layer: ExpertLayer, hidden: torch.Tensor, topk: TopK) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            layer: its experts.
            hidden: ``(T, H)``; not to be written to, other parts of the layer read it afterwards.
            topk: where its tokens go.

        Returns:
            ``(T, H)`` in the dtype of ``hidden``.
        """
        return layer.compute(hidden, topk, layer.own)

    def batch_begins(self) -> None:
        """A batch is about to be computed."""

    def attention(self, asked: Attention) -> bool:
        """A layer's attention on a CPU, for a strategy that does not leave it to the rank alone.

        Returns:
            Whether it is computed; if not, nothing is written, and the rank computes it.
        """
        del asked
        return False

    def pass_begins(self) -> None:
        """A forward pass over all layers begins."""

    def layer_begins(self, layer: int) -> None:
        """A layer of `told` is about to be computed."""

    def layer_ended(self, layer: int) -> None:
        """A layer of `told` has been computed."""

    def batch_done(self, passes: Sequence[tuple[int, int]], seconds: float) -> None:
        """A batch's answers are out.

        Args:
            passes: new and cached tokens of each of its requests; none for a batch that decoded.
            seconds: that it took.
        """

    def close(self) -> None:
        """Nothing is computed any more. Called where SGLang takes its model down, not where the process is killed."""

    def failed(self, error: Exception) -> None:
        """The rank ends on an error: the launcher should know the reason."""
        self.place.experts.report_failure(error)
