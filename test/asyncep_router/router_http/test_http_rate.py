"""`--rate-limit-tokens-per-second` end to end: what comes faster waits, and what cannot wait is refused.

The limit is a token bucket, one token a request, as large as `--max-concurrent-requests`. All bounds here are laws of
such a bucket over the time really taken, so that a slow machine changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

import httpx

from router_http.harness import NullWorker, RouterProcess

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]

BURST, RATE = 4, 1
LIMITS = f"--max-concurrent-requests {BURST} --rate-limit-tokens-per-second {RATE}"


def at_once(url: str, requests: int) -> tuple[Counter[int], float]:
    """Statuses of so many requests sent together, and the seconds until the last was answered."""

    async def run() -> Counter[int]:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            answers = await asyncio.gather(
                *(client.post("/generate", json={"input_ids": [1]}) for _ in range(requests))
            )
        return Counter(answer.status_code for answer in answers)

    started = time.monotonic()
    statuses = asyncio.run(run())
    return statuses, time.monotonic() - started


def test_beyond_the_rate_requests_wait_their_turn(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags=LIMITS).ready(1)
    statuses, seconds = at_once(process.url, BURST + 3)
    assert statuses == {200: BURST + 3}
    assert seconds >= 3 / RATE - 0.01  # three had to wait for a token each


def test_who_finds_the_queue_full_is_refused(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags=f"{LIMITS} --queue-size 2").ready(1)
    statuses, seconds = at_once(process.url, 200)
    assert set(statuses) == {200, 429}
    assert sum(statuses.values()) == 200
    assert BURST + 2 <= statuses[200] <= BURST + RATE * seconds + 1
    # A refused request never reached the worker.
    assert worker.counts["seen"] == statuses[200]


def test_who_waits_too_long_is_told_so(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags=f"{LIMITS} --queue-timeout-secs 1").ready(1)
    statuses, seconds = at_once(process.url, 60)
    assert set(statuses) == {200, 408}
    assert BURST <= statuses[200] <= BURST + RATE * seconds + 1
    assert worker.counts["seen"] == statuses[200]
    # The bucket fills again: the limit is on the rate, not on the number of requests.
    later, _ = at_once(process.url, 1)
    assert later == {200: 1}
