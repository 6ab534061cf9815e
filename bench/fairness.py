"""What one client's load does to another client's single requests.

    python bench/fairness.py [--quick] [--only LOAD,...] [--url URL]

One client asks for a prompt of three tokens every 100 ms, whatever comes back. Beside it another client sends, in turn:
nothing; a list of 10,000 prompts; the same for one rank by name; 10,000 prompts one by one on 64 connections; a
list of long prompts; 400 prompts of low priority; a batch; a text of 10 MB; a list of long texts. The other client is a
process of its own. The p95 of the first client beside each load is held against its p95 beside nothing and the time of
two batches, which is what a rank may have been given when a request comes. A batch is timed by itself: a list of as
many prompts of the load's length as fill one, for each rank. Each load comes three times, in turn with the others, and
the median of the three p95 counts. Requests during which the machine stood still (`pauses.py`) are left out and
counted. Writes `bench/out/fairness.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from models import QWEN3_TINY, random_qwen3, word_tokenizer
from pauses import watched
from records import Claim, write
from rich.console import Console

from asyncep.local_server import local_server

SEED = 20261129
EVERY = 0.1
# Even a load that is gone at once is looked at for so long.
LEAST_SECONDS = 5.0
# What a rank is given at a time, as the server's `--asyncep-threshold-tokens` has it.
BATCH_TOKENS = 2048
NO_TOKENS = {"sampling_params": {"max_new_tokens": 0}}


def _prompts(count: int, tokens: int, seed: int = SEED) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 512) for _ in range(tokens)] for _ in range(count)]


def _text(characters: int, seed: int) -> str:
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randrange(2, 9))) for _ in range(5000)]
    return " ".join(chance.choices(words, k=characters // 6))[:characters]


def nothing(url: str, scale: float) -> None:
    """No load."""


def long_list(url: str, scale: float, **fields: Any) -> None:
    """A list of many short prompts."""
    body = {"input_ids": _prompts(int(10_000 * scale), 3), **NO_TOKENS, **fields}
    httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status()


def named_rank(url: str, scale: float) -> None:
    """The same for one rank by name."""
    long_list(url, scale, routed_dp_rank=0)


def list_of_long_prompts(url: str, scale: float) -> None:
    """A list of prompts of 500 tokens."""
    body = {"input_ids": _prompts(int(1000 * scale), 500), **NO_TOKENS}
    httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status()


def singles(url: str, scale: float, *, count: int = 10_000, tokens: int = 3, **fields: Any) -> None:
    """Many prompts one by one, on 64 connections."""
    asyncio.run(_one_by_one(url, _prompts(int(count * scale), tokens), 64, fields))


async def _one_by_one(url: str, prompts: Sequence[list[int]], connections: int, fields: dict[str, Any]) -> None:
    waiting = iter(prompts)

    async def connection() -> None:
        for prompt in waiting:
            (await http.post("/generate", json={"input_ids": prompt, **NO_TOKENS, **fields})).raise_for_status()

    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        await asyncio.gather(*(connection() for _ in range(connections)))


def low_priority(url: str, scale: float) -> None:
    """400 prompts of 500 tokens at once, of the priority that jobs have."""

    async def all_at_once() -> None:
        await _one_by_one(url, prompts, len(prompts), {"priority": -1})

    prompts = _prompts(int(400 * scale), 500)
    asyncio.run(all_at_once())


def batch(url: str, scale: float) -> None:
    """A batch of 500 prompts of 500 tokens."""
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "default", "prompt": prompt, "max_tokens": 0},
        }
        for number, prompt in enumerate(_prompts(int(500 * scale), 500))
    ]
    file = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with httpx.Client(base_url=url, timeout=60) as http:
        sent = http.post("/v1/files", files={"file": ("in.jsonl", file)}, data={"purpose": "batch"})
        sent.raise_for_status()
        body = {"input_file_id": sent.json()["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        made = http.post("/v1/batches", json=body)
        made.raise_for_status()
        while (found := http.get(f"/v1/batches/{made.json()['id']}").json())["status"] != "completed":
            if found["status"] in ("failed", "expired", "cancelled"):
                raise RuntimeError(str(found))
            time.sleep(0.2)


def huge_text(url: str, scale: float) -> None:
    """A text of 10 MB, three times; no model here takes as much."""
    for number in range(3):
        answer = httpx.post(f"{url}/generate", json={"text": _text(10_000_000, number), **NO_TOKENS}, timeout=600)
        if answer.status_code not in (400, 413):
            raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")


def long_texts(url: str, scale: float) -> None:
    """A list of texts, 400 kB in all."""
    body = {"text": [_text(2_000, number) for number in range(int(200 * scale))], **NO_TOKENS}
    httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status()


LOADS: dict[str, Callable[[str, float], None]] = {
    "nothing": nothing,
    "list": long_list,
    "named rank": named_rank,
    "long prompts": list_of_long_prompts,
    "singles": singles,
    "low priority": low_priority,
    "batch": batch,
    "10 MB text": huge_text,
    "texts": long_texts,
}
SHORT = ("list", "named rank", "singles")


async def beside(url: str, load: Callable[[str, float], None], scale: float) -> dict[str, Any]:
    """Latencies of single requests while `load` runs in a process of its own."""
    prompts = iter(_prompts(100_000, 3))
    found: list[tuple[float, float]] = []
    process = multiprocessing.get_context("spawn").Process(target=load, args=(url, scale))

    async def probe() -> None:
        began = time.monotonic()
        answer = await http.post("/generate", json={"input_ids": next(prompts), **NO_TOKENS})
        answer.raise_for_status()
        found.append((began, time.monotonic()))

    limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
    with watched() as pauses:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
            began = time.perf_counter()
            process.start()
            async with asyncio.TaskGroup() as group:
                while process.is_alive() or time.perf_counter() - began < LEAST_SECONDS:
                    group.create_task(probe())
                    await asyncio.sleep(EVERY)
            seconds = time.perf_counter() - began
            process.join()
    if process.exitcode:
        raise RuntimeError(f"the load ended with status {process.exitcode}")
    took = sorted(end - begin for begin, end in found if not pauses.overlap(begin, end))
    if not took:
        raise RuntimeError(f"the machine stood still during all {len(found)} requests; run it again")
    return {
        "seconds": seconds,
        "probes": len(took),
        "p50": quantile(took, 0.5),
        "p95": quantile(took, 0.95),
        "max": took[-1],
        "left_out": len(found) - len(took),
        "stood_still_seconds": pauses.seconds(),
    }


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def batch_seconds(url: str, tokens: int) -> float:
    """Seconds of a batch of prompts of so many tokens while the other rank computes one too; the median of six."""

    def one(rank: int, number: int) -> float:
        prompts = _prompts(BATCH_TOKENS // tokens, tokens, SEED + 2 * number + rank)
        began = time.perf_counter()
        body = {"input_ids": prompts, "routed_dp_rank": rank, **NO_TOKENS}
        httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status()
        return time.perf_counter() - began

    with ThreadPoolExecutor(2) as pool:
        return statistics.median(took for number in range(3) for took in pool.map(one, range(2), [number] * 2))


@contextlib.contextmanager
def served(url: str | None) -> Iterator[str]:
    """The server at `url`, or one with two ranks and next to nothing to compute."""
    if url is not None:
        yield url
        return
    _, tokenizer = word_tokenizer(QWEN3_TINY["vocab_size"])
    flags = ("--dp-size", "2", "--tokenizer-path", str(tokenizer))
    with local_server(str(random_qwen3("qwen3-tiny", QWEN3_TINY)), flags) as found:
        yield found


def main() -> int:
    """Runs, prints, writes. Returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of each load")
    parser.add_argument("--only", metavar="LOAD,...", help=f"of: {', '.join(LOADS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of each load (default: %(default)s)")
    parser.add_argument("--url", help="a server that runs already")
    args = parser.parse_args()
    names = ["nothing", *(name for name in (args.only or ",".join(LOADS)).split(",") if name != "nothing")]
    console = Console()
    with served(args.url) as url:
        asyncio.run(beside(url, nothing, 1.0))  # connections, caches and kernels are made
        batches = {tokens: batch_seconds(url, tokens) for tokens in (3, 500)}
        console.print("a batch", "  ".join(f"of prompts of {tokens}: {took:.3f} s" for tokens, took in batches.items()))
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(1 if args.quick else args.rounds):
            for name in names:
                found = asyncio.run(beside(url, LOADS[name], 0.1 if args.quick else 1.0))
                rounds[name].append(found)
                console.print(f"{name:14}", "  ".join(f"{key} {value:.3f}" for key, value in found.items()))
    raw: dict[str, Any] = {
        name: {"p95": statistics.median(one["p95"] for one in found), "rounds": found} for name, found in rounds.items()
    }
    idle = raw["nothing"]
    claims = [
        Claim(
            f"p95 beside {name} over p95 of the idle server and two batches",
            found["p95"] / (idle["p95"] + 2 * batches[3 if name in SHORT else 500]),
            1.0,
            "ratio",
            at_least=False,
        )
        for name in names[1:]
        for found in (raw[name],)
    ]
    for claim in claims:
        console.print(f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.2f}")
    raw["batch_seconds"] = batches
    path = write("fairness" + ("-quick" if args.quick else ""), seed=SEED, raw=raw, claims=claims)
    console.print(str(path))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
