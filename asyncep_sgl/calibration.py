"""First work for the ranks of a group, so that T is measured before the first client comes."""

from __future__ import annotations

import logging
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

logger = logging.getLogger(__name__)

# Enough to tell a window's fixed part from what grows with FLOPs.
_TOKENS = (256, 1024, 512, 4096)
# SGLang takes a few tokens less than the model's context.
_SPARE = 16


def calibrate(url: str, *, ranks: int, vocabulary: int, context: int, api_key: str | None) -> None:
    """Has each rank compute a few prompts of random tokens, all ranks at the same time, and forget them again.

    Args:
        url: of this server, which answers already.
        vocabulary: token ids below it are drawn from.
        context: tokens of the longest prompt the model takes.
        api_key: the server's, if it has one.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # SGLang calls when it is about to listen: the first connections may come too early.
    client = httpx.Client(base_url=url, headers=headers, timeout=None, transport=httpx.HTTPTransport(retries=6))

    def load(rank: int) -> None:
        numbers = random.Random(rank)
        for tokens in _TOKENS:
            body = {
                "input_ids": numbers.choices(range(vocabulary), k=min(tokens, context - _SPARE)),
                "sampling_params": {"max_new_tokens": 0},
                **({"routed_dp_rank": rank} if ranks > 1 else {}),
            }
            client.post("/generate", json=body).raise_for_status()

    try:
        with client:
            with ThreadPoolExecutor(ranks) as pool:
                list(pool.map(load, range(ranks)))
            client.post("/flush_cache").raise_for_status()
    except httpx.HTTPError as error:
        # T is then what the peak says, until clients' batches teach better.
        logger.warning("the compute window could not be measured at start-up: %s", error)
