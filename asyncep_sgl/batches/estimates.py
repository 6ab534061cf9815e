"""How large answers will be: what is set aside before a batch is begun. Pure.

A batch's own answers correct the estimate as they come, so it has to be of the right order only.
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


def answer_bytes(endpoint: str, body: dict[str, Any], length: int) -> int:
    """Bytes that the answer to a request is expected to take.

    Args:
        endpoint: where it goes.
        body: the request.
        length: bytes of its line.
    """
    if endpoint == "/v1/embeddings":
        return _FRAME + _entries(body.get("input")) * _VECTOR * _NUMBER
    if endpoint == "/v1/score":
        return _FRAME + _entries(body.get("items")) * _entries(body.get("label_token_ids")) * _NUMBER
    if endpoint in ("/v1/rerank", "/v1/classify"):
        # Documents come back with their scores; a class has a number each.
        return 2 * _FRAME + 2 * length
    if endpoint == "/generate":
        answers = _entries(body.get("text", body.get("input_ids")))
        ids = _entries(body.get("token_ids_logprob")) * _ENTRY if body.get("token_ids_logprob") else 0
        # From where log-probabilities of the prompt are asked for; -1, the default, is the end alone.
        start = body.get("logprob_start_len")
        whole = body.get("return_logprob") is True and isinstance(start, int) and start >= 0
        echoed = length * _ECHOED * (1 + _count(body.get("top_logprobs_num"))) if whole else 0
        return (_FRAME + ids) * answers + echoed
    if endpoint == "/v1/completions":
        prompts = _entries(body.get("prompt")) if isinstance(body.get("prompt"), list) else 1
        echoed = length * _ECHOED * (1 + _count(body.get("logprobs"))) if body.get("echo") else 0
        return (_FRAME + _count(body.get("logprobs")) * _ENTRY) * prompts + echoed
    return 2 * _FRAME + _count(body.get("top_logprobs")) * _ENTRY


def _entries(value: Any) -> int:
    return max(1, len(value)) if isinstance(value, list) else 1


def _count(value: Any) -> int:
    """A small number that a client gave; what is no such number is refused when the request is served."""
    return min(value, 1000) if isinstance(value, int) and value > 0 else 0
