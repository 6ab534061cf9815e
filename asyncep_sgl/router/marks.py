"""How the router inside the engine knows whose request is whose: a mark that the front puts on it.

SGLang spreads a list over requests of its own in the tokenizer manager and copies ``http_worker_ipc`` to each of them.
That field says which of several tokenizers a reply goes to; a prefill-only server has one and never sets it. The mark
travels in it as far as the router, which takes it off: ranks see what they always do. A client's own value is lost.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

_SEPARATOR = "\x1f"
_numbers = itertools.count(1)


class Mark(NamedTuple):
    """Whose a request is: the client, the list it is one of `company` requests of, empty for a single one."""

    client: str = ""
    flow: str = ""
    company: int = 1


def put_on(request: Any, client: str) -> None:
    """Marks a request or list of SGLang's front, not yet spread, as the client's.

    Args:
        request: a ``GenerateReqInput`` or ``EmbeddingReqInput``.
        client: the caller's name, or where there are no keys the address it calls from.
    """
    company = _company(request)
    flow = f"{next(_numbers):x}" if company > 1 else ""
    request.http_worker_ipc = _SEPARATOR.join((client.replace(_SEPARATOR, ""), flow, str(company)))


def taken_off(request: Any) -> Mark:
    """The mark of one tokenized request, which no longer has it then. Without one it is nobody's, by itself."""
    text = request.http_worker_ipc
    request.http_worker_ipc = None
    parts = text.split(_SEPARATOR) if text else []
    if len(parts) != 3 or not parts[2].isdecimal():
        return Mark()
    return Mark(parts[0], parts[1], int(parts[2]))


def _company(request: Any) -> int:
    """Requests that SGLang will make of it: prompts times samples. Odd input counts as one; SGLang refuses it later."""
    prompts = 1
    for field in ("text", "input_ids", "input_embeds"):
        value = getattr(request, field, None)
        if isinstance(value, list) and (field == "text" or (value and isinstance(value[0], list))):
            prompts = max(prompts, len(value))
    sampling = getattr(request, "sampling_params", None)
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    samples = first.get("n", 1) if isinstance(first, dict) else 1
    return prompts * max(1, samples) if isinstance(samples, int) else prompts
