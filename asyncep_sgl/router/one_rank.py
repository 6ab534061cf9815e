"""The router of a server with one rank.

SGLang starts a lone rank without a controller, and the rank takes what comes as it comes. Prompts that arrive together
would then compute the prefix they share once each, all others' would wait behind a long queue, and the rank's end would
be the server's.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process


def run_router_of_one_rank(
    server_args: Any,
    port_args: Any,
    _gpu_id: int,
    _tp_rank: int,
    _pp_rank: int,
    _dp_rank: int | None,
    pipe_writer: Any,
) -> None:
    """Runs in the process that SGLang means to be the rank; is the router instead, and starts the rank itself."""
    run_data_parallel_controller_process(server_args, port_args, pipe_writer)
