"""Where SGLang's processes say hello to the launcher, and where they listen."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any, Literal

from sglang.srt.plugins.hook_registry import HookType

from asyncep_sgl import listening
from asyncep_sgl.config import AsyncEPConfig
from asyncep_sgl.errors import SeamError
from asyncep_sgl.experts.client import StoreClient
from asyncep_sgl.experts.messages import Hello, Welcome
from asyncep_sgl.seam import Seam


def keep_torch_from_listening(rank: int) -> None:
    """torch's store of a rank is a file in the run's folder: its server would listen on every address of the host.

    To be called in a rank, before it is built.
    """
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{tempfile.mkdtemp(prefix=f'rank-{rank}-')}/store"
    # From these, which would be the store's address, SGLang's kernels for AMX name their shared memory.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(os.getpid()))


def _before_controller(*_: Any, **__: Any) -> None:
    _say_hello("controller")


def _before_detokenizer(*_: Any, **__: Any) -> None:
    _say_hello("detokenizer")


def _say_hello(role: Literal["controller", "detokenizer"]) -> None:
    """The launcher watches this process from now on."""
    config = AsyncEPConfig.from_environment()
    if config is None:
        raise SeamError("a hook ran in a process that has no asyncep configuration")
    line = StoreClient(config.store_address)
    line.ask(Hello(role, os.getpid()), Welcome)
    line.close()


async def _around_listening(original: Callable[..., Any], server: Any, sockets: Any = None) -> None:
    """The HTTP server listens on what the launcher has bound for it."""
    door = listening.door
    if door is None or sockets is not None or not door.is_of(server.config.port):
        await original(server, sockets=sockets)
        return
    await original(server, sockets=door.unlock())
    door.opened.set()


PROCESS_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.__init__",
        _before_controller,
        HookType.BEFORE,
        ("self", "server_args", "port_args", "run_scheduler_process_func", "prelaunched_schedulers"),
    ),
    Seam(
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.__init__",
        _before_detokenizer,
        HookType.BEFORE,
        ("self", "server_args", "port_args"),
    ),
    Seam("uvicorn.server.Server.startup", _around_listening, HookType.AROUND, ("self", "sockets")),
)
