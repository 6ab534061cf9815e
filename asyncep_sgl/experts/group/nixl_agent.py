"""NIXL agents as this project needs them: event-driven, and on the CPU's memory."""

from __future__ import annotations

import os
from typing import Any

# The progress thread sleeps until there is something to do, and looks by itself this often. NIXL's Python interface
# sets 0, which makes the thread poll: a core for each process that has an agent, measured.
_LOOK_AGAIN_MICROSECONDS = 10_000


def make_agent(name: str) -> Any:
    """A NIXL agent with the UCX back-end and a progress thread that sleeps.

    UCX chooses the fabric; ``UCX_TLS`` and ``UCX_NET_DEVICES`` are the operator's to set.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    # What is read over TCP is sent in segments of this size. UCX's 8 KiB cost the sender a quarter more of its core.
    os.environ.setdefault("UCX_TCP_TX_SEG_SIZE", "64k")
    # Imported only here: it brings UCX into the process.
    from nixl import _api as nixl

    bindings = nixl.nixlBind
    stock = bindings.nixlAgentConfig

    class SleepingConfig(stock):  # type: ignore[misc, valid-type] # untyped bindings
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, _LOOK_AGAIN_MICROSECONDS if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = SleepingConfig
    try:
        return nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=True, backends=["UCX"]))
    finally:
        bindings.nixlAgentConfig = stock
