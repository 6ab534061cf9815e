"""A request's id: the client's, from the headers it may come in, or a new one that tells the endpoint."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DEFAULT_HEADERS = ("x-request-id", "x-correlation-id", "x-trace-id", "request-id")
_PREFIXES = {
    "/generate": "gnt-",
    "/v1/chat/completions": "chatcmpl-",
    "/v1/completions": "cmpl-",
    "/v1/score": "score-",
}
_LONGEST = 256


def request_id(headers: Mapping[str, str], path: str, names: Sequence[str] = ()) -> str:
    """The id to log, to send on and to answer with as `x-request-id`."""
    for name in names or DEFAULT_HEADERS:
        found = headers.get(name)
        # It goes into headers and logs: what could not stand there is not taken.
        if found and found.isascii() and found.isprintable():
            return found[:_LONGEST]
    # Not secrets: asking the kernel for every request costs more than placing it.
    return _PREFIXES.get(path, "req-") + f"{random.getrandbits(96):024x}"
