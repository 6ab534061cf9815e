"""``asyncep serve``: checks, divides the host among the ranks, and runs the server under supervision."""

from __future__ import annotations

import logging
import mmap
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from asyncep_kernels.help.board import board_bytes
from asyncep_kernels.native import isa
from asyncep_sgl.config.flags import Mode
from asyncep_sgl.config.model_support import check_supported, read_config
from asyncep_sgl.config.options import ServeOptions
from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig, RouterConfig
from asyncep_sgl.errors import UsageError
from asyncep_sgl.experts.shard.fingerprint import checkpoint_fingerprint
from asyncep_sgl.experts.shard.holdings import gathers, moe_layers
from asyncep_sgl.experts.store.server import StoreServer
from asyncep_sgl.launcher.command_line import sglang_arguments, uses_our_router
from asyncep_sgl.launcher.cuda_host import find_gpus, installed
from asyncep_sgl.launcher.cuda_serving import CudaPlan, plan
from asyncep_sgl.launcher.kv_budget import kv_tokens, one_batch_tokens
from asyncep_sgl.launcher.report import startup_report
from asyncep_sgl.launcher.run_directory import run_directory
from asyncep_sgl.launcher.supervisor import Supervisor
from asyncep_sgl.platform.detect import activate
from asyncep_sgl.process import listening
from asyncep_sgl.process.host import COMPUTING, available_bytes, divide_cpus
from asyncep_sgl.process.key_memory import hand_on, without_keys
from asyncep_sgl.process.segment import OwnedSegment
from asyncep_sgl.process.stop_signals import StopSignals
from asyncep_sgl.strategies import registry

logger = logging.getLogger("asyncep")

# A rank is a world of its own to torch, whose back-ends listen all the same: on loopback.
_LISTENING = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
# SGLang's front would otherwise wait a minute for dumps before it ends, in which every client hangs.
_AT_AN_END = {"SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}


def serve(options: ServeOptions, signals: StopSignals | None = None) -> int:
    """Serves until stopped; returns the exit status.

    Args:
        options: the command line.
        signals: what may end a start before there is a server.

    Raises:
        AsyncEPError: nothing was started, the message says why.
    """
    started = time.monotonic()
    cpu = options.device == "cpu" or (options.device is None and activate() is not None)
    if not cpu and options.device not in (None, "cuda"):
        raise UsageError(f"--device {options.device}: served are cuda and cpu")
    if cpu:
        options.refuse_meaningless(_mode_on_cpu(options))
    model_config = read_config(options.model, options.revision)
    check_supported(model_config, device="cpu" if cpu else "cuda")
    cuda = None if cpu else _plan_cuda(options, model_config)
    if cuda is not None:
        possible: tuple[Mode, ...] = ("gpu", "cuda", "pinned") if options.run.transport == "auto" else ()
        for warning in options.refuse_meaningless(cuda.mode, possible):
            logger.warning("%s", warning)
    group = _group(options, model_config, cuda)
    registry.find(_strategy(options, group)).refuse(options, group)
    check_batch_folder(options)
    # The front has them until its end; what would keep it from listening is known before anything is started.
    listeners = listening.bind(options.host, options.port)
    with run_directory() as directory, ExitStack() as memory:
        supervisor = _prepare(directory, memory, options, model_config, group, started, cuda)
        supervisor.listeners = listeners
        supervisor.environment = {**supervisor.environment, **listening.hand_on(listeners)}
        supervisor.signals = signals or supervisor.signals
        return supervisor.run()


def _plan_cuda(options: ServeOptions, model_config: dict[str, Any]) -> CudaPlan:
    gpus = find_gpus()
    if not gpus:
        raise UsageError("--device cuda: no GPU is visible; use --device cpu")
    found = plan(options, model_config, gpus, installed(gpus[0]))
    logger.warning("serving on GPUs has not been run on one yet: please report what happens")
    logger.info("%d x %s: %s", options.ranks, gpus[0].name, found.reason)
    return found


def _prepare(
    directory: Path,
    memory: ExitStack,
    options: ServeOptions,
    model_config: dict[str, Any],
    group: GroupConfig,
    started: float,
    cuda: CudaPlan | None,
) -> Supervisor:
    """The server, not started. Its processes read what ``memory`` closes."""
    on_devices = cuda is not None and cuda.transport == "cuda"
    store = StoreServer(options.ranks, options.run.store_limit, devices=on_devices, directory=directory)
    load_board = OwnedSegment("loads", mmap.PAGESIZE)
    help_board = OwnedSegment("help", board_bytes(options.ranks))
    keys = hand_on(options.keys)
    for segment in (load_board, help_board, keys):
        memory.callback(segment.close)
    cpus = divide_cpus(options.ranks)
    router = None
    if uses_our_router(options):
        router = RouterConfig(
            **vars(options.router),
            report_address=f"{store.address}-reports",
            state_address=f"{store.address}-router",
        )
    config = AsyncEPConfig(
        ranks=options.ranks,
        store_address=store.address,
        launcher_pid=os.getpid(),
        run_directory=str(directory),
        cpus=cpus if cuda is None else (),
        load_board=load_board.path,
        help_board=help_board.path,
        settings=options.run,
        router=router,
        group=replace(group, exporter_address=f"{store.address}-exporter"),
        batches=replace(options.batches, folder=str(batch_folder(options))),
        front=options.front,
        version=package_version("asyncep-sgl"),
        strategy=_strategy(options, group),
        transport="host" if cuda is None else cuda.transport,
        keys=keys.path,
    )
    strategy = registry.of(config)
    environment = {
        **_AT_AN_END,
        **without_keys(os.environ),
        **config.to_environment(),
        **_LISTENING,
        # SGLang's 5 s are what common clients keep connections for: a request may meet its connection's end.
        "SGLANG_TIMEOUT_KEEP_ALIVE": str(options.front.keep_alive_timeout_secs),
        "TMPDIR": str(directory),
    }
    tokens = None
    if cuda is None:
        environment |= _cpu_environment(cpus)
        if "--enable-torch-compile" not in options.passed:
            # What SGLang computes for a request's repetition_penalty or seed it has compiled at the first such request:
            # half a minute in which the rank answers nobody.
            environment["TORCHDYNAMO_DISABLE"] = "1"
        tokens = _cpu_kv_tokens(options, model_config)
    else:
        environment |= {"ASYNCEP_PLATFORM": "off", **cuda.environment}
    environment |= strategy.environment(os.environ)
    command = [
        sys.executable,
        "-m",
        "asyncep_sgl.front.server",
        *sglang_arguments(
            options,
            cpu=cuda is None,
            max_total_tokens=tokens,
            extra=strategy.sglang_flags() if cuda is None else cuda.flags,
        ),
    ]
    if cuda is None and not isa.computes_bf16() and _item_bytes(options) == 2:
        logger.warning(
            "this CPU has no instructions for bfloat16 and computes it many times more slowly than float32; with "
            "--dtype float32 the experts take twice the memory"
        )
    if cuda is None:
        logger.info("starting %d rank(s) of %s on %d CPU(s)", options.ranks, options.model, len(set().union(*cpus)))

    def report() -> None:
        registry = store.registry
        print(
            startup_report(
                registry.status(),
                model=options.model,
                url=registry.url or "",
                seconds=time.monotonic() - started,
            ),
            flush=True,
        )

    return Supervisor(
        store,
        command,
        environment,
        options.run.grace_seconds,
        report,
        ranks_restart=router is not None,
        side_processes=strategy.side_processes(),
    )


def _cpu_environment(cpus: Sequence[Sequence[int]]) -> dict[str, str]:
    return {
        "ASYNCEP_PLATFORM": "cpu",
        **{name: os.environ.get(name, value) for name, value in COMPUTING.items()},
        # Read when torch is imported, before a rank knows which it is; the rank itself then takes its exact share.
        "OMP_NUM_THREADS": str(len(cpus[0])),
        # NumPy's, which nothing here computes with: its pool of threads would keep a process from being forked.
        "OPENBLAS_NUM_THREADS": "1",
        # Without it SGLang refuses more ranks than NUMA nodes.
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, share)) for share in cpus),
    }


def _cpu_kv_tokens(options: ServeOptions, model_config: dict[str, Any]) -> int:
    if options.run.kv_free:
        return one_batch_tokens(model_config, options.passed)
    return kv_tokens(
        model_config,
        ranks=options.ranks,
        free_bytes=available_bytes(),
        item_bytes=_item_bytes(options),
    )


def _item_bytes(options: ServeOptions) -> int:
    """Of one weight. SGLang serves a checkpoint in float32 in half of that, unless told otherwise."""
    return 4 if options.dtype in ("float32", "float") else 2


def _strategy(options: ServeOptions, group: GroupConfig) -> str:
    return options.run.strategy or registry.default(group)


def _mode_on_cpu(options: ServeOptions) -> Mode:
    if options.group.nodes > 1:
        return "hosts"
    return "memory" if options.group.memory_limit is None else "disk"


def _group(options: ServeOptions, model_config: dict[str, Any], cuda: CudaPlan | None) -> GroupConfig:
    """Who keeps which experts, and whether anything has to be gathered because of it."""
    group = _host_group(options) if cuda is None else cuda.group
    transport = "host" if cuda is None else cuda.transport
    layers = moe_layers(model_config, _item_bytes(options))
    return replace(group, gathers=gathers(group, options.ranks, transport, layers))


def _host_group(options: ServeOptions) -> GroupConfig:
    group = GroupConfig.of(options.group)
    if group.nodes == 1:
        # What memory holds is kept whole, whichever layers those are.
        return replace(group, resident_layers=0)
    return replace(group, model=checkpoint_fingerprint(options.model, options.revision, options.dtype))


def batch_folder(options: ServeOptions) -> Path:
    """Where the Batch API keeps its state: as told, or by the port, so that a server started again finds it."""
    if options.batches.folder:
        return Path(options.batches.folder).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "asyncep" / "batches" / str(options.port)


def check_batch_folder(options: ServeOptions) -> None:
    """Makes the folder that was named, and sees that it can be written to.

    Raises:
        UsageError: it cannot.
    """
    if not options.batches.folder:
        return
    folder = batch_folder(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--asyncep-batch-dir {folder}: {error.strerror}; give a folder to write to") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--asyncep-batch-dir {folder}: not writable; give a folder to write to")
