"""Where this package sits in SGLang's data-parallel controller, which is the router's process."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookType

from asyncep_sgl.config.run import active_config
from asyncep_sgl.experts.store.client import say_hello
from asyncep_sgl.process.seam import Seam

_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
_PARAMETERS = ("server_args", "port_args", "run_scheduler_process_func", "prelaunched_schedulers")


def _before_controller(*_: Any, **__: Any) -> None:
    """The launcher watches this process from now on."""
    say_hello(active_config().store_address, "controller")


# SGLang's own controller too, where the user has chosen one of its methods.
CONTROLLER_SEAMS: tuple[Seam, ...] = (
    Seam(f"{_CONTROLLER}.__init__", _before_controller, HookType.BEFORE, ("self", *_PARAMETERS)),
)


def router_seam() -> Seam:
    """Our router in the controller's place."""
    # Imported only now: it subclasses what it replaces.
    from asyncep_sgl.router.controller import RouterController

    return Seam(_CONTROLLER, RouterController, HookType.REPLACE, _PARAMETERS)
