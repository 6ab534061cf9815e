"""What may reach a rank. Every refusal is a ValueError that names the field; SGLang answers it with a 400."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncep_sgl.front.wording import NATIVE, Names

# One new token is sampled from the prefill pass itself; the second would be the first decode step.
MOST_NEW_TOKENS = 1


def accepted_tokens(named: int | None) -> int | None:
    """Tokens of the longest prompt that ranks take, of the number that SGLang names: it takes fewer."""
    return None if named is None else named - 1


def check_prompt(
    input_ids: Sequence[int] | None,
    vocabulary: int,
    most: int | None = None,
    names: Names = NATIVE,
    *,
    given_as_ids: bool = False,
) -> None:
    """Refuses a prompt no rank could embed.

    Args:
        input_ids: token ids; None for prompts given as embeddings.
        vocabulary: number of token ids the model has.
        most: tokens that a rank takes; None if that is not known.
        names: what the caller calls the fields.
        given_as_ids: the caller has given the ids themselves.

    Raises:
        ValueError: empty, too long, or an id outside the vocabulary (which would end the scheduler).
    """
    if input_ids is None:
        return
    field = names.ids if given_as_ids else names.text
    if not len(input_ids):
        raise ValueError(f"{field}: the prompt is empty; give at least one token in {_either(names)}")
    if most is not None and len(input_ids) > most:
        raise ValueError(
            f"{field}: the prompt has {len(input_ids)} tokens, and the model's context length leaves room for {most}; "
            "shorten it"
        )
    # The usual case, without a step in Python for each token.
    if set(map(type, input_ids)) == {int} and min(input_ids) >= 0 and max(input_ids) < vocabulary:
        return
    for position, token in enumerate(input_ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{_token(names, position)}: {token!r} is not an integer")
        if not 0 <= token < vocabulary:
            raise ValueError(f"{_token(names, position)}: token id {token} is outside the vocabulary [0, {vocabulary})")


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


def check_prefill_only(sampling_params: Mapping[str, Any], name: str = "sampling_params.max_new_tokens") -> None:
    """Refuses a request that would decode.

    Args:
        name: what the caller calls the number of new tokens.

    Raises:
        ValueError: ``max_new_tokens`` is missing (SGLang would decode 128), negative, or above one.
    """
    tokens = sampling_params.get("max_new_tokens")
    if tokens is None:
        raise ValueError(
            f"{name}: this server is prefill-only; set it to 0 (SGLang's default would decode "
            "128 tokens), or start the server with --asyncep-decode allow"
        )
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise ValueError(f"{name}: {tokens!r} is not an integer")
    if tokens < 0:
        raise ValueError(f"{name}: {tokens} is negative; use 0")
    if tokens > MOST_NEW_TOKENS:
        raise ValueError(
            f"{name}: this server is prefill-only and {tokens} tokens would need decoding; "
            f"use 0 or {MOST_NEW_TOKENS}, or start the server with --asyncep-decode allow"
        )


def _token(names: Names, position: int) -> str:
    """Where a token stands: other fields than SGLang's hold more than one prompt's ids."""
    return f"{names.ids}[{position}]" if names == NATIVE else f"{names.ids}: token {position} of the prompt"


def _either(names: Names) -> str:
    return names.text if names.text == names.ids else f"{names.text} or {names.ids}"
