"""First work for the ranks of a group, so that T is measured before the first client comes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx

logger = logging.getLogger(__name__)

# Enough to tell a window's fixed part from what grows with FLOPs.
_TOKENS = (256, 1024, 512, 4096)
# Then near what just hides a gather, where T comes from, as far as is known by then; and again, knowing more.
_SHARES = (0.85, 1.15, 1.0)
_REFINEMENTS = 2
# SGLang takes a few tokens less than the model's context.
_SPARE = 16


def calibrate(
    url: str,
    *,
    ranks: int,
    vocabulary: int,
    context: int,
    api_key: str | None,
    hiding_tokens: Callable[[], int | None],
) -> None:
    """Has each rank compute a few prompts of random tokens, all ranks at the same time, and forget them again.

    Args:
        url: of this server, which answers already.
        vocabulary: token ids below it are drawn from.
        context: tokens of the longest prompt the model takes.
        api_key: the server's, if it has one.
        hiding_tokens: tokens of the prompt that just hides its gathers, by what has been measured; None until known.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # SGLang calls when it is about to listen: the first connections may come too early.
    # Its certificate, if it has one, is for others to check.
    way = httpx.HTTPTransport(retries=6, verify=False)
    client = httpx.Client(base_url=url, headers=headers, timeout=None, transport=way)
    numbers = [random.Random(rank) for rank in range(ranks)]

    def load(rank: int, lengths: Sequence[int]) -> None:
        for tokens in lengths:
            body = {
                "input_ids": numbers[rank].choices(range(vocabulary), k=max(1, min(tokens, context - _SPARE))),
                "sampling_params": {"max_new_tokens": 0},
                **({"routed_dp_rank": rank} if ranks > 1 else {}),
            }
            client.post("/generate", json=body).raise_for_status()

    try:
        with client:
            with ThreadPoolExecutor(ranks) as pool:
                list(pool.map(load, range(ranks), [_TOKENS] * ranks))
                for _ in range(_REFINEMENTS):
                    near = hiding_tokens()
                    if near:
                        lengths = [int(near * share) for share in _SHARES]
                        list(pool.map(load, range(ranks), [lengths] * ranks))
            client.post("/flush_cache").raise_for_status()
    except httpx.HTTPError as error:
        # T is then what the peak says, until clients' batches teach better.
        logger.warning("the compute window could not be measured at start-up: %s", error)
