"""What bench/paper.py has served: the paper's mix and four lengths made smaller, a trace, real text; and how.

Lengths are cut to what two cores compute in seconds. A rank's T is some thousand tokens, as on GPUs, so the mix
keeps a quarter of its lengths (many requests a batch), the four lengths a sixteenth (attention grows with the square).
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from router_load import Answers, Load, send, session

from asyncep.demo.news import TOPICS, sample_articles
from asyncep.demo.task import GUIDE, QUESTION
from asyncep.demo.weights import load_tokenizer
from asyncep.sim.paper_mix import real_mix, synthetic
from asyncep.sim.traces import read_trace
from asyncep.sim.workloads import TimedPrompt, conversations
from asyncep_router.cost import ModelCost

PAGE = 16
MIX_LENGTHS = 1 / 4
SYNTHETIC_LENGTHS = 1 / 16
MIX, LONG = "mix", "long"
# Requests of each of the four lengths: 32, 256, 2,048 and 8,192 tokens.
SYNTHETIC = {"short": 768, "medium": 192, "long": 36, "ultra-long": 4}


@dataclass(frozen=True)
class Size:
    """How much of each load. `mix`: share of the paper's requests. `text`: articles of each topic."""

    mix: float
    synthetic: float
    conversations: int
    text: int


FULL = Size(mix=0.02, synthetic=1.0, conversations=12, text=15)
QUICK = Size(mix=0.0003, synthetic=0.05, conversations=2, text=1)


def make_loads(size: Size, cost: ModelCost, vocabulary: int, seed: int, trace: Path | None) -> list[Load]:
    """Every load, the mix first, each prompt folded into `vocabulary`."""
    prompts: dict[str, list[TimedPrompt]] = {
        MIX: real_mix(seed=seed, scale=size.mix, length_scale=MIX_LENGTHS * min(1.0, size.synthetic * 4)),
    }
    for name, count in SYNTHETIC.items():
        shorter = SYNTHETIC_LENGTHS * (1.0 if size.synthetic == 1 else 0.25)
        count = max(2, round(count * size.synthetic))
        prompts[name] = synthetic(name, count, seed=seed, spread=0.1, length_scale=shorter)
    if trace is not None:
        prompts[f"trace {trace.name}"] = read_trace(trace, limit=90, scale=1 / 16, keep=0.01)
    else:
        turn = (40, 260)
        prompts["conversations (generated)"] = conversations(
            size.conversations, seed=seed, turns=4, system_tokens=32, turn_tokens=turn
        )
    prompts["news"] = news(size.text)
    return [load_of(name, each, cost, vocabulary) for name, each in prompts.items()]


def load_of(name: str, prompts: Sequence[TimedPrompt], cost: ModelCost, vocabulary: int) -> Load:
    """The prompts, all sent at once, their token ids folded into the vocabulary: what prompts share stays shared."""
    for prompt in prompts:
        for at, token in enumerate(prompt.token_ids):
            prompt.token_ids[at] = token % (vocabulary - 10) + 3
    return Load(name, prompts, len(prompts), PAGE, cost)


def news(per_topic: int) -> list[TimedPrompt]:
    """The demo's articles behind the demo's guide, tokenized by its tokenizer: real lengths, real sharing."""
    tokenizer = load_tokenizer()
    guide = tokenizer.encode(GUIDE)
    out = []
    for article in sample_articles("evaluate", min(per_topic, 30), seed=1):
        tokens = guide + tokenizer.encode(f"{article.body}\n{article.headline}\n{QUESTION}")
        out.append(TimedPrompt(0.0, array("i", tokens[:2000]), 0, len(guide)))
    assert len(out) == len(TOPICS) * min(per_topic, 30)
    return out


def warm(url: str, load: Load, share: float) -> None:
    """A part of a load, its answers thrown away: the first batches of a server pay for memory and compiled kernels."""
    asyncio.run(send(url, load, share))


def serve(url: str, load: Load) -> Answers:
    """All of it, as fast as it is taken."""
    return asyncio.run(send(url, load))


def serve_at(url: str, bodies: Sequence[bytes], rate: float, seed: int) -> list[float]:
    """Seconds each request took, when they come in Poisson times, `rate` requests a second."""
    return asyncio.run(_at(url, bodies, rate, seed))


async def _at(url: str, bodies: Sequence[bytes], rate: float, seed: int) -> list[float]:
    numbers = random.Random(seed)
    times, now = [], 0.0
    for _ in bodies:
        now += numbers.expovariate(rate)
        times.append(now)
    async with session(url) as http:
        began = time.perf_counter()

        async def one(at: float, body: bytes) -> float:
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            async with http.post("/generate", data=body, headers={"content-type": "application/json"}) as answer:
                await answer.read()
                answer.raise_for_status()
            # From when it was due: a client that is late must not make a server look early.
            return time.perf_counter() - began - at

        return list(await asyncio.gather(*(one(at, body) for at, body in zip(times, bodies, strict=True))))


def steady_seconds(
    urls: Sequence[str], tokens: int, lanes: int, in_flight: int, count: int, numbers: random.Random
) -> float:
    """Seconds a step takes in which each of ``lanes`` batches is one prompt of ``tokens`` tokens, in steady state.

    Args:
        urls: where; with one URL for each lane, each lane's requests go to its own.
        in_flight: requests at a time: the next batch is waiting when one ends, and is one prompt.
        count: steps.
    """
    per_url = lanes // len(urls)

    def body() -> bytes:
        ids = [numbers.randrange(3, 500) for _ in range(tokens)]
        return orjson.dumps({"input_ids": ids, "sampling_params": {"max_new_tokens": 0}})

    async def run() -> float:
        async with httpx.AsyncClient(timeout=600) as http:

            async def one(url: str, content: bytes) -> None:
                answer = await http.post(
                    f"{url}/generate", content=content, headers={"content-type": "application/json"}
                )
                answer.raise_for_status()

            async def client(url: str, bodies: Any) -> None:
                for content in bodies:
                    await one(url, content)

            ends = []
            for steps in (2, count):  # the first are not timed
                bodies = {url: iter([body() for _ in range(steps * per_url)]) for url in urls}
                began = time.perf_counter()
                await asyncio.gather(*(client(url, bodies[url]) for url in urls for _ in range(in_flight // len(urls))))
                ends.append((time.perf_counter() - began) / steps)
            return ends[-1]

    return asyncio.run(run())
