"""The front process: SGLang's HTTP server with our plug-in, in its stock order of steps. Started by the launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import starlette.requests
from starlette.responses import Response
from starlette.routing import Route

from asyncep_router.long_lived import importing, return_memory, settle
from asyncep_sgl.config.model_support import read_config
from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.store.client import ask_once, say_hello
from asyncep_sgl.experts.store.messages import Done, Failed, Serving, Status, StatusRequest
from asyncep_sgl.front import sglang_flags
from asyncep_sgl.front.access import Policy
from asyncep_sgl.front.asgi import error_body
from asyncep_sgl.front.batches.api import BatchApi, BatchLife
from asyncep_sgl.front.batches.bounds import Bounds
from asyncep_sgl.front.drain import Drain
from asyncep_sgl.front.guard import abort_route, guard
from asyncep_sgl.front.rank_health import RankHealth
from asyncep_sgl.front.validation import accepted_tokens
from asyncep_sgl.process.key_memory import read_keys
from asyncep_sgl.process.lifeline import die_with
from asyncep_sgl.process.listening import Door, inherited
from asyncep_sgl.router.state import router_state
from asyncep_sgl.strategies import registry
from asyncep_sgl.strategies.base import FrontPlace

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
# After which a client may ask a silent process again.
_RETRY_SECONDS = 2
# Requests of batches under way for each rank. The router lets others pass them; without it an interactive request
# waits behind those that are there.
_BATCH_REQUESTS_ROUTED = 64
_BATCH_REQUESTS = 16


def main(arguments: list[str]) -> None:
    """Parses SGLang's own flags and serves until told to stop.

    Args:
        arguments: SGLang's command line, ours taken out.
    """
    config = AsyncEPConfig.from_environment()
    if config is None:
        raise SystemExit("this module is started by asyncep serve, not by hand")
    # Before the imports, which take long: the launcher may be killed meanwhile.
    die_with(config.launcher_pid, config.run_directory)
    door = inherited()
    with _reasons_reported(config.store_address):
        _serve(arguments, config, door)


@contextlib.contextmanager
def _reasons_reported(store_address: str) -> Iterator[None]:
    """Tells the launcher why the front ends, where it knows; its log may be long."""
    try:
        yield
    except (Exception, SystemExit) as error:
        code = error.code if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        if isinstance(code, str):
            with contextlib.suppress(StoreError):
                lines = code.removeprefix("asyncep serve: ").strip().splitlines()
                reason = f"the front ends: {lines[-1] if lines else repr(error)}"
                ask_once(store_address, Failed(-1, reason), Done, patience=1.0)
        raise


def _serve(arguments: list[str], config: AsyncEPConfig, door: Door) -> None:
    with importing():
        from sglang.srt.plugins import load_plugins

        # First, as in sglang.launch_server: what is imported from here on is already hooked.
        load_plugins()
        from asyncep_sgl.front.seams import owner_of
        from asyncep_sgl.front.start import (
            admit_zero_max_tokens,
            fork_processes_ahead,
            leave_garbage_to_us,
            sglang_refuses,
        )
        from asyncep_sgl.process.seam import assert_active

        admit_zero_max_tokens()
        from sglang.srt.entrypoints.http_server import app, get_global_state, launch_server
        from sglang.srt.managers.scheduler import run_scheduler_process
        from sglang.srt.server_args import prepare_server_args
        from sglang.srt.utils import kill_process_tree

        from asyncep_sgl.front.questions import ask_who_is_there
        from asyncep_sgl.router.one_rank import run_router_of_one_rank

    leave_garbage_to_us()
    assert_active()
    if config.cpus and "fork-ahead" not in config.settings.without:
        fork_processes_ahead()
    address, strategy = config.store_address, registry.of(config)
    say_hello(address, "front")

    server_args = sglang_flags.read(arguments, prepare_server_args)
    server_args.resolve_once()
    sglang_flags.refuse_other_doors(server_args)
    sglang_flags.refuse_truncation(server_args)
    host = "127.0.0.1" if server_args.host in ("0.0.0.0", "::", "") else server_args.host

    def store_status() -> Status:
        return ask_once(address, StatusRequest(), Status)

    def status() -> dict[str, Any]:
        """Ranks, experts owned, bytes read and resident, as the launcher sees them."""
        found: dict[str, Any] = msgspec.to_builtins(store_status())
        # For a router in front: whether a batch below T takes as long as one of T.
        found["waits_for_weights"] = strategy.gathers
        if config.router is not None:
            # The lowest of the ranks' T: what a router in front of this server may count on for each of them.
            with contextlib.suppress(TimeoutError):
                state = router_state(config.router.state_address)
                found["threshold_flops_per_layer"] = state["threshold_flops_per_layer"]
        elif thresholds := [gather["threshold_flops"] for gather in found["gathers"] if gather["threshold_flops"]]:
            found["threshold_flops_per_layer"] = min(thresholds)
        return found

    if config.router is not None:
        state_address = config.router.state_address
        app.add_api_route("/router/state", lambda: _or_503(lambda: router_state(state_address)), methods=["GET"])
        rank_health = RankHealth(state_address, sglang_refuses)
        ask_who_is_there(rank_health.ranks_there)
        # Before SGLang's own of the same names.
        app.router.routes[:0] = rank_health.routes()
    # SGLang adds its own route when it starts, after this one, and only with its --enable-metrics.
    app.routes.append(
        Route("/metrics", lambda request: _metrics(request, config, strategy.collectors(store_status), server_args))
    )
    for gate, arguments_of_gate in strategy.gates():
        app.add_middleware(gate, **arguments_of_gate)
    policy = Policy(read_keys(config.keys), config.settings.decode == "allow")
    batches = BatchApi(
        app,
        Path(config.batches.folder),
        server_args.model_path,
        most=config.ranks * (_BATCH_REQUESTS_ROUTED if config.router is not None else _BATCH_REQUESTS),
        bounds=Bounds(config.batches.file_bytes, config.batches.file_days, config.batches.disk_floor),
        keys=policy.keys,
    )

    def drained() -> None:
        batches.end()
        os._exit(0)

    app.routes.extend(batches.routes())
    app.add_middleware(BatchLife, api=batches)
    model = read_config(server_args.model_path, server_args.revision)
    context = server_args.context_length or model["max_position_embeddings"]

    def most_tokens() -> int | None:
        return accepted_tokens(get_global_state().tokenizer_manager.max_req_input_len)

    guard(app, config.front, policy, context=context, most_tokens=most_tokens)
    app.routes.insert(
        0,
        abort_route(
            policy.keys,
            lambda **which: get_global_state().tokenizer_manager.abort_request(**which),
            lambda rid: owner_of(get_global_state().tokenizer_manager, rid),
        ),
    )
    app.add_middleware(Drain, finish=drained)
    app.add_api_route(
        "/asyncep/status", lambda: _or_503(status), methods=["GET"], name="status", description=status.__doc__
    )
    scheme = "https" if server_args.ssl_certfile else "http"
    url = f"{scheme}://{host}:{server_args.port}"

    def serving() -> None:
        door.wait()
        strategy.first_work(FrontPlace(url, policy.internal, model, context, store_status))
        if "rare-collections" not in config.settings.without:
            settle()
        # Ranks keep theirs (`host.COMPUTING`). They are there by now, and others are forked from a template.
        return_memory()
        ask_once(address, Serving(url), Done)
        batches.begin()

    rank: Callable[..., Any] = run_scheduler_process
    if config.ranks == 1 and config.router is not None:
        rank = run_router_of_one_rank
    try:
        launch_server(server_args, run_scheduler_process_func=rank, launch_callback=serving)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


def _or_503(question: Callable[[], _Answer]) -> _Answer | Response:
    """The answer of another process of this server, or a 503 that says that there is none."""
    try:
        return question()
    except TimeoutError as error:
        silent = str(error)
    except StoreError as error:
        logger.warning("%s", error)  # it names the socket, which is no client's to know
        silent = "the launcher does not answer"
    headers = {"retry-after": str(_RETRY_SECONDS)}
    return Response(error_body(503, silent), 503, headers=headers, media_type="application/json")


def _metrics(
    request: starlette.requests.Request, config: AsyncEPConfig, of_strategy: Sequence[Any], server_args: Any
) -> Response:
    """The router's and the strategy's figures; SGLang's too if it was asked for them."""
    from asyncep_sgl.front.router_metrics import RouterCollector, exposition

    collectors: list[Any] = []
    if config.router is not None:
        state_address = config.router.state_address
        collectors.append(RouterCollector(lambda: router_state(state_address)))
    collectors += of_strategy
    accept = request.headers.get("accept", "")

    def text() -> Response:
        body, content_type = exposition(collectors, accept, sglang=server_args.enable_metrics)
        return Response(body, headers={"content-type": content_type})

    return _or_503(text)


if __name__ == "__main__":
    main(sys.argv[1:])
