"""How many prompts a request has, and whether that is too many. Pure."""

from __future__ import annotations

from typing import Any

from asyncep_router.http.errors import BadRequest

# Fields that hold one prompt or a list of them; a list of numbers is one prompt of token ids.
_LISTS = {
    "/generate": ("input_ids", "text", "input_embeds"),
    "/encode": ("input_ids", "text", "input_embeds"),
    "/classify": ("input_ids", "text", "input_embeds"),
    "/v1/completions": ("prompt",),
    "/v1/embeddings": ("input",),
    "/v1/classify": ("input",),
    "/v1/score": ("items",),
    "/v1/rerank": ("documents",),
}


def check_prompts(path: str, fields: dict[str, Any], most: int) -> int:
    """The number of prompts in a body. Raises `BadRequest` beyond `most`, naming the field."""
    found = 1
    for name in _LISTS.get(path, ()):
        count = _count(fields.get(name))
        if count > most:
            raise BadRequest(f"{name}: {count} prompts, at most {most} are taken in one request (--max-prompts)")
        found = max(found, count)
    return found


def _count(value: Any) -> int:
    if not isinstance(value, list):
        return 0 if value is None else 1
    # One prompt's token ids; anything odd is left to a worker to refuse.
    return 1 if value and isinstance(value[0], int | float) else len(value)
