"""Every seam between this package and SGLang 0.5.23, and nothing else.

SGLang calls `register` once in each of its processes. In a process that ``asyncep serve`` did not start it does
nothing, so stock ``sglang`` stays stock on a machine where this package is installed. What the seams are stands where
they belong: `rank.seams`, `router.seams`, `front.seams`.
"""

from __future__ import annotations

from sglang.srt.disaggregation.kv_events import EventPublisherFactory
from sglang.srt.platforms import current_platform
from sglang.srt.plugins.hook_registry import HookType

from asyncep_sgl.config.run import AsyncEPConfig, active_config
from asyncep_sgl.front.seams import DETOKENIZER_SEAMS, FRONT_SEAMS
from asyncep_sgl.platform import fallbacks
from asyncep_sgl.platform.cpu import AnyCpuPlatform
from asyncep_sgl.process.lifeline import die_with
from asyncep_sgl.process.seam import Seam, hook, hooked_all
from asyncep_sgl.rank.reports import RouterEventPublisher
from asyncep_sgl.rank.seams import CUDA_KERNEL_SEAMS, CUDA_SEAMS, KERNEL_SEAMS, RANK_SEAMS, our_kernels
from asyncep_sgl.router.seams import CONTROLLER_SEAMS, router_seam

# Name under which SGLang's KV-cache events go to our router (``--kv-events-config``).
ROUTER_PUBLISHER = "asyncep"


def _load_snapshot_path(_ipc_name: str) -> str:
    return active_config().load_board


# In every run.
SEAMS: tuple[Seam, ...] = (
    Seam("sglang.srt.managers.load_snapshot.shm_path_for", _load_snapshot_path, HookType.REPLACE, ("ipc_name",)),
    *RANK_SEAMS,
    *CONTROLLER_SEAMS,
    *FRONT_SEAMS,
    *DETOKENIZER_SEAMS,
)

# Needed wherever the plain-CPU platform serves, stock SGLang included.
CPU_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul",
        fallbacks.fused_gate_sigmoid_mul,
        HookType.REPLACE,
        ("hidden_states", "gate_weight", "shared_output", "output", "do_add"),
    ),
)


def all_seams() -> tuple[Seam, ...]:
    """Those of any run."""
    return (*SEAMS, router_seam(), *CPU_SEAMS, *KERNEL_SEAMS, *CUDA_SEAMS, *CUDA_KERNEL_SEAMS)


def seams_of(config: AsyncEPConfig) -> tuple[Seam, ...]:
    """Those of one run, the plain-CPU platform's own aside."""
    return (*SEAMS, *_further(config))


def _further(config: AsyncEPConfig) -> tuple[Seam, ...]:
    router = (router_seam(),) if config.router is not None else ()
    if config.transport != "host":
        return (*router, *CUDA_SEAMS, *(CUDA_KERNEL_SEAMS if config.settings.kernels == "ours" else ()))
    return (*router, *(KERNEL_SEAMS if our_kernels(config) else ()))


def register() -> None:
    """Entry point of ``sglang.srt.plugins``."""
    if isinstance(current_platform, AnyCpuPlatform):
        hook(CPU_SEAMS)
    config = AsyncEPConfig.from_environment()
    if config is None:
        return
    die_with(config.launcher_pid, config.run_directory)
    hook(SEAMS)
    # Only now: the router subclasses what it replaces.
    hook(_further(config))
    if config.router is not None:
        EventPublisherFactory.register_publisher(ROUTER_PUBLISHER, RouterEventPublisher)
    hooked_all()
