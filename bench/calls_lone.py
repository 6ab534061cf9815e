"""Prompts that come alone, for bench/calls.py: how long each takes on one side, whichever host it is sent to."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import httpx
from router_load import difference as _difference  # noqa: F401

LABELS = (3, 4, 5)


def body(numbers: random.Random, tokens: int, vocabulary: int) -> dict[str, object]:
    """A request for the log-probabilities of `LABELS` after random tokens."""
    return {
        "input_ids": [numbers.randrange(3, vocabulary) for _ in range(tokens)],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": list(LABELS),
    }


def lone(
    url: str, lengths: Sequence[int], repeats: int, vocabulary: int, seed: int
) -> tuple[dict[str, list[float]], dict[str, list[list[float]]]]:
    """Seconds and log-probabilities of each of ``repeats`` prompts of each length, one after the other.

    The same prompts for whoever is asked with the same seed. One more of each length is not timed.
    """
    seconds: dict[str, list[float]] = {}
    answers: dict[str, list[list[float]]] = {}
    with httpx.Client(timeout=600) as client:
        for tokens in lengths:
            numbers = random.Random(seed * 10_000 + tokens)
            for turn in range(repeats + 1):
                content = body(numbers, tokens, vocabulary)
                began = time.perf_counter()
                answer = client.post(f"{url}/generate", json=content)
                took = time.perf_counter() - began
                answer.raise_for_status()
                if turn:
                    found = answer.json()["meta_info"]["output_token_ids_logprobs"][0]
                    seconds.setdefault(str(tokens), []).append(took)
                    answers.setdefault(str(tokens), []).append([entry[0] for entry in found])
    return seconds, answers
