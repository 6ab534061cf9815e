"""What one request may ask for altogether, checked where SGLang has made an object of it."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import HTTPException

from asyncep_router.rates import Rates
from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.front.asgi import Refusal
from asyncep_sgl.front.fields import Bounds, answer_values, check_request
from asyncep_sgl.front.passage import caller, in_batch, passage

_rates = Rates()


@functools.lru_cache(maxsize=1)
def _bounds(vocabulary: int, context: int, config: AsyncEPConfig) -> Bounds:
    return Bounds(
        vocabulary=vocabulary,
        max_prompts=config.front.max_prompts,
        max_prompt_chars=config.front.prompt_chars(context),
        max_samples=config.front.max_samples,
        max_values=config.front.max_logprobs,
        decodes=config.settings.decode == "allow",
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


def check_texts(serving: Any, request: Any, config: AsyncEPConfig) -> None:
    """Counts the prompts that SGLang makes of a query and many texts before they are made.

    Args:
        serving: SGLang's handler of the endpoint.
        request: one of its request models.
        config: of the run.

    Raises:
        Refusal: there are too many, or they are too large.
    """
    texts = getattr(request, "items", None) or getattr(request, "documents", None)
    query = getattr(request, "query", None)
    if not isinstance(texts, list) or query is None:
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
