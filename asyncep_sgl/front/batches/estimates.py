"""How many prompts a request has, and how large its answer will be: what is set aside for a batch. Pure.

A batch's own answers correct the estimate of their size as they come, so it has to be of the right order only.
"""

from __future__ import annotations

from typing import Any

# The frame of an answer: ids, usage, finish reason and the line's own fields.
_FRAME = 1000
# Bytes of JSON for each byte of a prompt: about a token for four bytes, and for each token its text and a number.
_ECHOED = 12
# Bytes of JSON for one log-probability with its id or text, and for one number of a vector.
_ENTRY, _NUMBER = 40, 25
_VECTOR = 4096


# Where a request has its prompts.
_PROMPTS = {
    "/v1/embeddings": ("input",),
    "/v1/classify": ("input",),
    "/v1/score": ("items",),
    "/v1/rerank": ("documents",),
    "/v1/completions": ("prompt",),
    "/generate": ("text", "input_ids"),
}


def prompts(endpoint: str, body: dict[str, Any]) -> int:
    """Prompts of a request, at least 1."""
    return max((_entries(body.get(field)) for field in _PROMPTS.get(endpoint, ())), default=1)


def answer_bytes(endpoint: str, body: dict[str, Any], length: int) -> int:
    """Bytes that the answer to a request is expected to take.

    Args:
        endpoint: where it goes.
        body: the request.
        length: bytes of its line.
    """
    if endpoint == "/v1/embeddings":
        return _FRAME + prompts(endpoint, body) * _VECTOR * _NUMBER
    if endpoint == "/v1/score":
        labels = body.get("label_token_ids")
        return _FRAME + prompts(endpoint, body) * (len(labels) if isinstance(labels, list) else 1) * _NUMBER
    if endpoint in ("/v1/rerank", "/v1/classify"):
        # Documents come back with their scores; a class has a number each.
        return 2 * _FRAME + 2 * length
    if endpoint == "/generate":
        answers, wanted = prompts(endpoint, body), body.get("token_ids_logprob")
        ids = len(wanted) * _ENTRY if isinstance(wanted, list) else 0
        # From where log-probabilities of the prompt are asked for; -1, the default, is the end alone.
        start = body.get("logprob_start_len")
        whole = body.get("return_logprob") is True and isinstance(start, int) and start >= 0
        echoed = length * _ECHOED * (1 + _count(body.get("top_logprobs_num"))) if whole else 0
        return (_FRAME + ids) * answers + echoed
    if endpoint == "/v1/completions":
        echoed = length * _ECHOED * (1 + _count(body.get("logprobs"))) if body.get("echo") else 0
        return (_FRAME + _count(body.get("logprobs")) * _ENTRY) * prompts(endpoint, body) + echoed
    return 2 * _FRAME + _count(body.get("top_logprobs")) * _ENTRY


def _entries(value: Any) -> int:
    """Of a list of texts or of lists of ids; a list of ids is one prompt."""
    if not isinstance(value, list) or (value and isinstance(value[0], int)):
        return 1
    return max(1, len(value))


def _count(value: Any) -> int:
    """A small number that a client gave; what is no such number is refused when the request is served."""
    return min(value, 1000) if isinstance(value, int) and value > 0 else 0
