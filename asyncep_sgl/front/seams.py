"""Where this package sits in SGLang's front, that is, its HTTP server and tokenizer, and in its detokenizer."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import Any
from weakref import ref

from sglang.srt.plugins.hook_registry import HookType

from asyncep_router.long_lived import settle
from asyncep_sgl.config.run import active_config
from asyncep_sgl.experts.store.client import say_hello
from asyncep_sgl.front import lists, questions
from asyncep_sgl.front.admission import admit, check_texts, count_answer
from asyncep_sgl.front.passage import asked, caller, endpoint, in_batch, passage
from asyncep_sgl.front.tokenizing import answer, tokenize
from asyncep_sgl.front.validation import accepted_tokens, check_prefill_only, check_priority, check_prompt
from asyncep_sgl.front.wording import names_at, placed, renamed
from asyncep_sgl.process import listening
from asyncep_sgl.process.seam import Seam
from asyncep_sgl.router.marks import put_on
from asyncep_sgl.router.rank_order import ranks_take_orders

# Others have none, which is 0; higher goes first.
_BATCH_PRIORITY = -1
# What SGLang makes where a client gives no id.
_RANDOM_ID = re.compile("[0-9a-f]{32}")
# What is written for a request that somebody ended: the client's own doing, or the operator's; nothing to try again.
_ABORTED = 409
_OWNER = "asyncep_owner"


def _before_generate(manager: Any, obj: Any, request: Any = None, *_: Any, **__: Any) -> None:
    """Fields are looked at before SGLang spreads a batch over its requests."""
    try:
        admit(manager, obj, active_config())
    except ValueError as error:
        raise ValueError(renamed(str(error), names_at(endpoint.get()))) from None
    # Requests of this process itself have no caller.
    check_priority(obj.priority, admin=request is None or caller.get().admin)
    if in_batch.get() and _router_has_priorities(manager.server_args):
        # Whatever a line says, others pass it.
        obj.priority = _BATCH_PRIORITY if obj.priority is None else min(obj.priority, _BATCH_PRIORITY)
    obj.http_worker_ipc = None
    if active_config().router is not None:
        address = getattr(request, "client", None)
        put_on(obj, caller.get().name or (address.host if address else ""))


def _around_generate(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any = None
) -> Any:
    """A long list is served in parts, so that others are heard in between."""
    url = getattr(request, "url", None)
    endpoint.set(url.path if url is not None else "")
    asked.set((ref(obj), 0))
    _before_generate(manager, obj, request)
    some = lists.parts(obj)
    if some is None:
        return original(manager, obj, request)
    first = {id(part): number * lists.PART_PROMPTS for number, part in enumerate(some)}

    def serve(part: Any) -> AsyncGenerator[Any, None]:
        # Each part is served by a task of its own.
        asked.set((ref(part), first[id(part)]))
        return original(manager, part, request)

    return lists.served(some, serve)


def _router_has_priorities(server_args: Any) -> bool:
    """Whether a priority is the router's alone: ranks that schedule by it, or refuse it, have an order of their own."""
    return active_config().router is not None and ranks_take_orders(server_args)


def _before_validate(manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """Bad input is answered here, before it can reach a rank."""
    config, names = active_config(), names_at(endpoint.get())
    most = accepted_tokens(manager.max_req_input_len)
    sampling = getattr(obj, "sampling_params", None)
    try:
        as_ids = getattr(obj, "text", None) is None
        check_prompt(input_ids, manager.model_config.vocab_size, most, names, given_as_ids=as_ids)
        if config.settings.decode == "refuse" and hasattr(obj, "return_logprob"):
            check_prefill_only(sampling or {}, names.tokens)
    except ValueError as error:
        raise ValueError(_placed(str(error), obj)) from None
    try:
        # Not one entry's: what all of the list ask for together.
        count_answer(obj, len(input_ids or ()), config)
    except ValueError as error:
        raise ValueError(renamed(str(error), names)) from None


def _placed(message: str, obj: Any) -> str:
    whole, first = asked.get()
    parent = whole() if whole is not None else None
    rids = getattr(parent, "rid", None)
    # Behind those of the list's prompts stand those of further samples.
    return placed(message, obj.rid, rids[: parent.batch_size] if isinstance(rids, list) and parent else None, first)


_WEIGHTS_ARE_SHARED = "the experts are shared by all ranks and read-only; restart asyncep serve to change weights"


async def _refuse_weights_from_disk(*_: Any, **__: Any) -> tuple[bool, str, int]:
    return False, _WEIGHTS_ARE_SHARED, 0


async def _refuse_weights(*_: Any, **__: Any) -> tuple[bool, str]:
    return False, _WEIGHTS_ARE_SHARED


def owner_of(manager: Any, rid: str) -> str | None:
    """The name of the caller of a request in progress; None if there is none of that id."""
    state = manager.rid_to_state.get(rid)
    return None if state is None else getattr(state, _OWNER, "")


def _note_owner(_: None, manager: Any, obj: Any, *__: Any) -> None:
    name = caller.get().name
    for rid in [obj.rid] if obj.is_single else obj.rid:
        setattr(manager.rid_to_state[rid], _OWNER, name)


def _note_sent(_manager: Any, _tokenized: Any) -> None:
    this = passage.get()
    if this is not None:
        this.sent = True


def _around_abort(original: Callable[..., None], manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """Ranks end every request whose id begins with the one they are told: an id that begins others' is not told."""
    chosen = not abort_all and not _RANDOM_ID.fullmatch(rid)
    if chosen and any(other != rid and other.startswith(rid) for other in manager.rid_to_state):
        return
    original(manager, rid=rid, abort_all=abort_all)


def _before_abort_reason(_manager: Any, out: Any, *_: Any) -> None:
    """A request that was ended has no answer: its client gets an error, not an empty text."""
    reason = out["meta_info"]["finish_reason"]
    if reason.get("type") == "abort" and reason.get("status_code") is None:
        reason["status_code"] = _ABORTED
        reason["message"] = reason.get("message") or "the request was aborted"


def _before_handle_request(serving: Any, request: Any, _raw: Any) -> None:
    if getattr(request, "echo", False) is True and getattr(request, "logprobs", None) == 0:
        # SGLang takes no alternatives for no log-probabilities at all.
        request.logprobs = 1
    check_texts(serving, request, active_config())


async def _around_listening(original: Callable[..., Any], server: Any, sockets: Any = None) -> None:
    """The HTTP server listens on what the launcher has bound for it."""
    door = listening.door
    if door is None or sockets is not None or not door.is_of(server.config.port):
        await original(server, sockets=sockets)
        return
    await original(server, sockets=door.unlock())
    door.opened.set()


# --- detokenizer -------------------------------------------------------------------------------------------------


def _before_detokenizer(*_: Any, **__: Any) -> None:
    """The launcher watches this process from now on."""
    say_hello(active_config().store_address, "detokenizer")


def _before_detokenizing(_manager: Any) -> None:
    if "rare-collections" not in active_config().settings.without:
        settle()


_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_OPENAI = "sglang.srt.entrypoints.openai"

_COMMUNICATOR = "sglang.srt.managers.communicator.FanOutCommunicator"

FRONT_SEAMS: tuple[Seam, ...] = (
    Seam(
        f"{_TOKENIZER}.update_weights_from_disk",
        _refuse_weights_from_disk,
        HookType.REPLACE,
        ("self", "obj", "request"),
    ),
    *(
        Seam(
            f"{_TOKENIZER}.update_weights_from_{source}", _refuse_weights, HookType.REPLACE, ("self", "obj", "request")
        )
        for source in ("tensor", "distributed", "ipc")
    ),
    Seam(f"{_COMMUNICATOR}.__call__", questions.call, HookType.REPLACE, ("self", "obj")),
    Seam(f"{_COMMUNICATOR}.handle_recv", questions.handle_recv, HookType.REPLACE, ("self", "recv_obj")),
    Seam(
        f"{_TOKENIZER}.open_session",
        questions.around_open_session,
        HookType.AROUND,
        ("self", "obj", "request"),
    ),
    Seam(
        f"{_TOKENIZER}.generate_request",
        _around_generate,
        HookType.AROUND,
        ("self", "obj", "request"),
    ),
    Seam(
        f"{_TOKENIZER}._tokenize_texts",
        tokenize,
        HookType.AROUND,
        ("self", "texts", "is_cross_encoder"),
    ),
    Seam(
        f"{_TOKENIZER}._validate_one_request",
        _before_validate,
        HookType.BEFORE,
        ("self", "obj", "input_ids"),
    ),
    Seam(f"{_TOKENIZER}._init_req_state", _note_owner, HookType.AFTER, ("self", "obj", "request")),
    Seam(f"{_TOKENIZER}._send_one_request", _note_sent, HookType.BEFORE, ("self", "tokenized_obj")),
    Seam(f"{_TOKENIZER}._send_batch_request", _note_sent, HookType.BEFORE, ("self", "tokenized_objs")),
    Seam(f"{_TOKENIZER}.abort_request", _around_abort, HookType.AROUND, ("self", "rid", "abort_all")),
    Seam(
        f"{_TOKENIZER}._handle_abort_finish_reason",
        _before_abort_reason,
        HookType.BEFORE,
        ("self", "out", "state", "is_stream"),
    ),
    *(
        Seam(
            f"{_OPENAI}.serving_tokenize.{name}._handle_non_streaming_request",
            answer,
            HookType.AROUND,
            ("self", "adapted_request", "request", "raw_request"),
        )
        for name in ("OpenAIServingTokenize", "OpenAIServingDetokenize")
    ),
    Seam(
        "sglang.srt.entrypoints.anthropic.serving.AnthropicServing.handle_count_tokens",
        answer,
        HookType.AROUND,
        ("self", "request", "raw_request"),
    ),
    Seam(
        f"{_OPENAI}.serving_base.OpenAIServingBase.handle_request",
        _before_handle_request,
        HookType.BEFORE,
        ("self", "request", "raw_request"),
    ),
    Seam("uvicorn.server.Server.startup", _around_listening, HookType.AROUND, ("self", "sockets")),
)

DETOKENIZER_SEAMS: tuple[Seam, ...] = (
    Seam(
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.__init__",
        _before_detokenizer,
        HookType.BEFORE,
        ("self", "server_args", "port_args"),
    ),
    Seam(
        "sglang.srt.managers.detokenizer_manager.DetokenizerManager.event_loop",
        _before_detokenizing,
        HookType.BEFORE,
        ("self",),
    ),
)
