"""What may reach a rank. Every refusal is a ValueError that names the field; SGLang answers it with a 400."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# One new token is sampled from the prefill pass itself; the second would be the first decode step.
MOST_NEW_TOKENS = 1


def check_prompt(input_ids: Sequence[int] | None, vocabulary: int) -> None:
    """Refuses a prompt no rank could embed.

    Args:
        input_ids: token ids; None for prompts given as embeddings.
        vocabulary: number of token ids the model has.

    Raises:
        ValueError: empty, or an id outside the vocabulary (which would end the scheduler).
    """
    if input_ids is None:
        return
    if not len(input_ids):
        raise ValueError("text: the prompt is empty; give at least one token in text or input_ids")
    # The usual case, without a step in Python for each token.
    if set(map(type, input_ids)) == {int} and min(input_ids) >= 0 and max(input_ids) < vocabulary:
        return
    for position, token in enumerate(input_ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"input_ids[{position}]: {token!r} is not an integer")
        if not 0 <= token < vocabulary:
            raise ValueError(f"input_ids[{position}]: token id {token} is outside the vocabulary [0, {vocabulary})")


def check_priority(priority: int | None, *, admin: bool) -> None:
    """Refuses a priority that would let its request pass others'.

    Args:
        priority: of the request; None has the normal one, which is 0.
        admin: whether the caller has the admin key.

    Raises:
        ValueError: it is above the normal one, and the caller is not the administrator.
    """
    if priority is not None and priority > 0 and not admin:
        raise ValueError(
            f"priority: {priority} goes before other clients' requests, which takes the admin key (--admin-api-key); "
            "leave it out, or use 0 or less"
        )


def check_prefill_only(sampling_params: Mapping[str, Any]) -> None:
    """Refuses a request that would decode.

    Raises:
        ValueError: ``max_new_tokens`` is missing (SGLang would decode 128), negative, or above one.
    """
    tokens = sampling_params.get("max_new_tokens")
    if tokens is None:
        raise ValueError(
            "sampling_params.max_new_tokens: this server is prefill-only; set it to 0 (SGLang's default would decode "
            "128 tokens), or start the server with --asyncep-decode allow"
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise ValueError(f"sampling_params.max_new_tokens: {tokens!r} is not an integer")
    if tokens < 0:
        raise ValueError(f"sampling_params.max_new_tokens: {tokens} is negative; use 0")
    if tokens > MOST_NEW_TOKENS:
        raise ValueError(
            f"sampling_params.max_new_tokens: this server is prefill-only and {tokens} tokens would need decoding; "
            f"use 0 or {MOST_NEW_TOKENS}, or start the server with --asyncep-decode allow"
        )
