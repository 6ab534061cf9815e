"""What is done to SGLang's front before it starts, besides hooks."""

from __future__ import annotations

from asyncep_router.long_lived import importing
from asyncep_sgl.errors import SeamError


def admit_zero_max_tokens() -> None:
    """Lets ``/v1/completions`` be asked for no new token, which upstream refuses though ``/generate`` takes it.

    To be called before SGLang's HTTP server is imported: its routes keep the schema they find then.

    Raises:
        SeamError: upstream has no such check any more.
    """
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest

    validators = CompletionRequest.__pydantic_decorators__.field_validators
    if validators.pop("validate_max_tokens_positive", None) is None:
        raise SeamError("seam CompletionRequest.validate_max_tokens_positive is gone")
    CompletionRequest.model_rebuild(force=True)


def leave_garbage_to_us() -> None:
    """Keeps SGLang from asking its own server to freeze its objects, with a key that it has not; `settle` does it.

    To be called when SGLang's HTTP server is imported.

    Raises:
        SeamError: upstream does not ask any more.
    """
    from sglang.srt.entrypoints import http_server

    if not hasattr(http_server, "_freeze_gc_after_server_warmup"):
        raise SeamError("seam http_server._freeze_gc_after_server_warmup is gone")
    http_server._freeze_gc_after_server_warmup = lambda _server_args: None


def fork_processes_ahead() -> None:
    """Lets the front's processes, and the ranks of its controller, be forked from what the front has imported.

    To be called in the front when it has imported SGLang's server and done nothing else.
    """
    from asyncep_sgl.process.template import import_everything

    with importing():
        import_everything()
        from sglang.srt.entrypoints import engine
        from sglang.srt.managers import data_parallel_controller as controller

    from asyncep_sgl.process.prefork import PreforkContext, fork_ahead
    from asyncep_sgl.router.one_rank import run_router_of_one_rank

    engine.mp = controller.mp = PreforkContext()
    # A scheduler or what starts it, and the detokenizer.
    starters = (controller.run_data_parallel_controller_process, run_router_of_one_rank)
    fork_ahead(2, {starter.__name__ for starter in starters})


def sglang_refuses() -> str | None:
    """Why SGLang's front takes no requests: it is starting or stopping. None if it takes them."""
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    state = get_global_state()
    if state is None or state.tokenizer_manager.server_status == ServerStatus.Starting:
        return "the server is starting"
    return "the server is stopping" if state.tokenizer_manager.gracefully_exit else None
