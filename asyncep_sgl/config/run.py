"""The one configuration of a run: made by the launcher, read in every process through the environment."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import msgspec

from asyncep_sgl.config.front import FrontSettings
from asyncep_sgl.config.settings import BatchSettings, GroupSettings, RouterSettings, RunSettings
from asyncep_sgl.errors import SeamError

CONFIG_VARIABLE = "ASYNCEP_CONFIG"
# Where batches are cut by FLOPs, the bound that memory sets; more than SGLang's own on a CPU.
LARGEST_BATCH_TOKENS = 16_384


@dataclass(frozen=True, kw_only=True)
class RouterConfig(RouterSettings):
    """The router inside the engine.

    Attributes:
        report_address: ZeroMQ address where ranks report finished batches and cache changes.
        state_address: ZeroMQ address that answers any message with the router's state as JSON.
    """

    report_address: str
    state_address: str


@dataclass(frozen=True, kw_only=True)
class GroupConfig(GroupSettings):
    """Where the experts of a run lie, and how this host gathers what it lacks.

    Attributes:
        depth: slots of gathered layers in each rank.
        resident_layers: MoE layers, from the first, that every host, or device, keeps whole.
        memory_limit: bytes of experts this host may keep; layers beyond it stay in the checkpoint. None keeps all.
        model: fingerprint of the checkpoint.
        exporter_address: ZeroMQ address where this host's exporter answers its ranks.
        devices: ranks of this host that each keep a part of the experts in a device's memory; 1 divides nothing.
        lanes: side streams of a device's gather.
        gathers: whether a rank lacks experts of any layer, see `asyncep_sgl.experts.shard.holdings`.
    """

    depth: int = 2
    resident_layers: int = 0
    memory_limit: int | None = None
    model: str = ""
    exporter_address: str = ""
    devices: int = 1
    lanes: int = 1
    gathers: bool = False

    @classmethod
    def of(cls, settings: GroupSettings, depth: int = 2) -> GroupConfig:
        """What was asked for; ``depth`` where the settings leave it open."""
        return cls(**vars(settings), depth=settings.gather_depth or depth)

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
        help_board: file behind which ranks of one host offer each other work; memory of the launcher's too.
        settings: how the server computes and ends.
        router: the router inside the engine; None leaves dispatch to SGLang's own controller.
        group: where the experts lie.
        batches: the Batch API's files; its folder is there.
        front: bounds on what clients may ask.
        version: of this package.
        strategy: how experts and tokens come together, see `asyncep_sgl.strategies.registry`.
        transport: where the experts lie: ``host`` in the host's memory for CPUs, ``cuda`` in the devices' memory, a
            part each, ``pinned`` in the host's memory for devices.
        keys: file with the server's keys, in the launcher's memory; empty where it has none.
    """

    ranks: int
    store_address: str
    launcher_pid: int
    run_directory: str = ""
    cpus: tuple[tuple[int, ...], ...] = ()
    load_board: str
    help_board: str = ""
    settings: RunSettings = RunSettings()
    router: RouterConfig | None = None
    group: GroupConfig = GroupConfig()
    batches: BatchSettings = BatchSettings()
    front: FrontSettings = FrontSettings()
    version: str = ""
    strategy: str = "replicated"
    transport: Literal["host", "cuda", "pinned"] = "host"
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
