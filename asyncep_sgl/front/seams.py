"""Where the front's checks sit in SGLang's tokenizer process."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from sglang.srt.plugins.hook_registry import HookType

from asyncep_router.rates import Rates
from asyncep_sgl.batches.mark import in_batch
from asyncep_sgl.config import AsyncEPConfig
from asyncep_sgl.front.asgi import Refusal
from asyncep_sgl.front.caller import caller
from asyncep_sgl.front.fields import Bounds, answer_values, check_request
from asyncep_sgl.front.passage import passage
from asyncep_sgl.front.tokenizing import answer
from asyncep_sgl.seam import Seam

# What SGLang makes where a client gives no id.
_RANDOM_ID = re.compile("[0-9a-f]{32}")
# What is written for a request that somebody ended: the client's own doing, or the operator's; nothing to try again.
_ABORTED = 409
_OWNER = "asyncep_owner"

_rates = Rates()


@functools.lru_cache(maxsize=1)
def _bounds(vocabulary: int, context: int, config: AsyncEPConfig) -> Bounds:
    return Bounds(
        vocabulary=vocabulary,
        max_prompts=config.front.max_prompts,
        max_prompt_chars=config.front.prompt_chars(context),
        max_samples=config.front.max_samples,
        max_values=config.front.max_logprobs,
        decodes=config.decode == "allow",
    )


def admit(manager: Any, request: Any, config: AsyncEPConfig) -> None:
    """Checks a request before SGLang spreads it over its prompts.

    Args:
        manager: SGLang's tokenizer manager.
        request: SGLang's ``GenerateReqInput`` or ``EmbeddingReqInput``.
        config: of the run.

    Raises:
        ValueError: a field is wrong; SGLang answers 400.
        HTTPException: 429, the caller's rate is used up.
    """
    if passage.get() is None:
        return  # a question of the server's own, such as a sign of life
    if manager.is_generation and not hasattr(request, "return_logprob"):
        raise ValueError(
            "this model generates text and has no head for embeddings, classes or ranks; ask for log-probabilities of "
            "labels with /v1/score, or start the server with --is-embedding for a model that has one"
        )
    prompts = check_request(request, _bounds(manager.model_config.vocab_size, manager.context_len, config))
    # A batch waits for its owner's rate before it sends a line.
    if not in_batch.get() and (seconds := _rates.take(caller.get(), prompts)) > 0:
        raise HTTPException(
            429,
            f"this key's rate is used up (prompts_per_second); send {prompts} prompts again in {seconds:.1f} s",
            {"retry-after": str(int(seconds) + 1)},
        )


def count_answer(request: Any, tokens: int, config: AsyncEPConfig) -> None:
    """Adds one prompt's log-probabilities to those of its HTTP request.

    Raises:
        ValueError: the answer would be too large.
    """
    this = passage.get()
    values = answer_values(request, tokens)
    if this is not None:
        this.values += values
        values = this.values
    if values > config.front.max_logprobs:
        raise ValueError(
            f"logprob_start_len, token_ids_logprob, top_logprobs_num: the answer would have over "
            f"{config.front.max_logprobs} log-probabilities (--asyncep-max-logprobs); ask for fewer ids, fewer "
            "positions, or send several requests"
        )


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
    """Prompts that SGLang makes of a query and many texts are counted before they are made."""
    config = AsyncEPConfig.from_environment()
    texts = getattr(request, "items", None) or getattr(request, "documents", None)
    query = getattr(request, "query", None)
    if config is None or not isinstance(texts, list) or query is None:
        return
    field = "items" if getattr(request, "items", None) else "documents"
    most = config.front.max_prompts
    if len(texts) > most:
        raise Refusal(
            400, f"{field}: {len(texts)} texts, {most} are taken in one request (--asyncep-max-prompts); send several"
        )
    longest = config.front.prompt_chars(serving.tokenizer_manager.context_len)
    sizes = [len(text) if isinstance(text, str | list) else 0 for text in texts]
    size = len(query) if isinstance(query, str | list) else 0
    if size + max(sizes, default=0) > longest:
        raise Refusal(
            400,
            f"query, {field}: a prompt of over {longest} characters (--asyncep-max-prompt-chars); "
            "the model's context holds no more",
        )
    if size * len(texts) + sum(sizes) > 2 * config.front.max_body_bytes:
        raise Refusal(
            400,
            f"query, {field}: the query repeated before each text makes over {2 * config.front.max_body_bytes} "
            "characters (twice --asyncep-max-body-bytes); send several requests",
        )


_TOKENIZER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_OPENAI = "sglang.srt.entrypoints.openai"

FRONT_SEAMS: tuple[Seam, ...] = (
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
)
