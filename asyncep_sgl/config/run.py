"""The one configuration of a run: made by the launcher, read in every process through the environment."""

from __future__ import annotations

import functools
import os
from typing import Literal

import msgspec

from asyncep_sgl.config.front import FrontOptions
from asyncep_sgl.errors import SeamError

CONFIG_VARIABLE = "ASYNCEP_CONFIG"
# Where batches are cut by FLOPs, the bound that memory sets; more than SGLang's own on a CPU.
LARGEST_BATCH_TOKENS = 16_384


# What may be left out to see what it is worth (``--asyncep-without``); answers are the same without.
Saving = Literal[
    "direct-replies", "batch-tokenization", "rare-collections", "joined-events", "no-access-log", "fork-ahead"
]


class RouterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The router inside the engine.

    Attributes:
        report_address: ZeroMQ address where ranks report finished batches and cache changes.
        state_address: ZeroMQ address that answers any message with the router's state as JSON.
        threshold_tokens: a batch as the FLOPs of a prompt of so many tokens; with gathers T until a rank has measured
            its own, and never less.
        max_wait_seconds: how long little work may wait for company while a rank is idle.
        log_decisions: write a JSON line for each.
    """

    report_address: str
    state_address: str
    threshold_tokens: int
    max_wait_seconds: float
    log_decisions: bool


class GroupConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The hosts that share one set of experts, and how this one gathers what the others keep.

    Attributes:
        nodes: hosts of the group.
        node: which of them this is.
        copies: hosts that keep each expert.
        resident_layers: MoE layers, from the first, that every host keeps whole.
        resident_experts: experts of every other layer that a host keeps beyond its share.
        memory_limit: bytes of experts this host may keep; layers beyond it stay in the checkpoint. None keeps all.
        depth: slots of gathered layers in each rank.
        verify: compare each gathered expert's digest with its owner's.
        margin: gamma, by how much T exceeds the FLOPs that just hide a gather.
        rendezvous: ``host:port`` where node 0 listens.
        model: fingerprint of the checkpoint.
        threshold_tokens: batches are cut at T, but not below the FLOPs of a prompt of so many tokens.
        exporter_address: ZeroMQ address where this host's exporter answers its ranks.
        patience_seconds: how long requests wait for a host that went away before they are refused.
        devices: ranks of this host that each keep a part of the experts in a device's memory; 1 divides nothing.
        lanes: side streams of a device's gather.
        gathers: whether a rank lacks experts of any layer, see `asyncep_sgl.experts.shard.holdings`.
    """

    nodes: int = 1
    node: int = 0
    copies: int = 1
    resident_layers: int = 0
    resident_experts: int = 0
    memory_limit: int | None = None
    depth: int = 2
    verify: bool = True
    margin: float = 1.2
    rendezvous: str = ""
    model: str = ""
    threshold_tokens: int = 2048
    exporter_address: str = ""
    patience_seconds: float = 30.0
    devices: int = 1
    lanes: int = 1
    gathers: bool = False

    @property
    def divides(self) -> bool:
        """Whether the experts may lie elsewhere than in memory that every rank of the host reads."""
        return self.nodes > 1 or self.memory_limit is not None or self.devices > 1


class AsyncEPConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of one server has to know.

    Attributes:
        ranks: number of scheduler processes that share the experts (``--dp-size``).
        store_address: ZeroMQ address of the expert store's owner (the launcher).
        launcher_pid: the process whose end ends every other.
        run_directory: its private folder, which is removed with it; empty for none.
        cpus: for each rank, the CPU numbers it may run on; empty where the device is not a CPU.
        load_board: file behind which SGLang's ranks publish their load; memory of the launcher's, so that it ends with
            it (upstream leaves one file a start in ``/dev/shm``).
        router: settings of the router inside the engine; None leaves dispatch to SGLang's own controller.
        group: the hosts that share the experts.
        version: of this package.
        log_gathers: write a JSON line for each batch that gathered.
        batch_folder: where the Batch API keeps its files and state.
        file_bytes, file_days, disk_floor: what its files may take, see `asyncep_sgl.front.batches.bounds.Bounds`.
        kernels: whose experts and attention compute on a CPU: this project's, or the torch code SGLang has.
        without: savings of processor time that are left out.
        strategy: how experts and tokens come together, see `asyncep_sgl.strategies.registry`.
        transport: where the experts lie: ``host`` in the host's memory for CPUs, ``cuda`` in the devices' memory, a
            part each, ``pinned`` in the host's memory for devices.
        front: bounds on what clients may ask.
        keys: file with the server's keys, in the launcher's memory; empty where it has none.
        decode: what happens to a request that would decode: ``refuse`` answers 400, ``allow`` serves it.
    """

    ranks: int
    store_address: str
    launcher_pid: int
    run_directory: str = ""
    cpus: tuple[tuple[int, ...], ...] = ()
    load_board: str
    router: RouterConfig | None = None
    group: GroupConfig = GroupConfig()
    version: str = ""
    log_gathers: bool = False
    strategy: str = "replicated"
    transport: Literal["host", "cuda", "pinned"] = "host"
    batch_folder: str = ""
    file_bytes: int = 20 * 10**9
    file_days: int = 30
    disk_floor: int | None = None
    decode: Literal["refuse", "allow"] = "refuse"
    kernels: Literal["ours", "sglang"] = "ours"
    without: tuple[Saving, ...] = ()
    front: FrontOptions = FrontOptions()
    keys: str = ""

    def to_environment(self) -> dict[str, str]:
        """The variables a child process needs to find this configuration again."""
        return {CONFIG_VARIABLE: msgspec.json.encode(self).decode()}

    @staticmethod
    def from_environment() -> AsyncEPConfig | None:
        """The run this process belongs to, or None in a process that ``asyncep serve`` did not start.

        Raises:
            SystemExit: the variable is set but not a configuration.
        """
        text = os.environ.get(CONFIG_VARIABLE)
        return _decoded(text) if text else None


def active_config() -> AsyncEPConfig:
    """The run this process belongs to, for what only runs in its processes.

    Raises:
        SeamError: there is none.
    """
    config = AsyncEPConfig.from_environment()
    if config is None:
        raise SeamError("a hook ran in a process that has no asyncep configuration")
    return config


@functools.lru_cache(maxsize=1)
def _decoded(text: str) -> AsyncEPConfig:
    try:
        return msgspec.json.decode(text, type=AsyncEPConfig)
    except msgspec.MsgspecError as error:
        raise SystemExit(
            f"{CONFIG_VARIABLE} is not a configuration ({error}); it is set by asyncep serve, unset it"
        ) from error
