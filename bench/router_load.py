"""Prompts for bench/router.py, clients that send them, and what they measured."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from router_sides import processor_seconds_by_role

from asyncep.sim.redundancy import Redundancy
from asyncep.sim.traces import read_trace
from asyncep.sim.workloads import TimedPrompt, conversations, few_shot_mix, long_inputs
from asyncep_router.cost import ModelCost

LABELS = (11, 22, 33, 44)


class Load:
    """Prompts with their bounds. Sent in order by `clients` clients, each with one request at a time."""

    def __init__(self, name: str, prompts: Sequence[TimedPrompt], clients: int, page: int, cost: ModelCost) -> None:
        self.name, self.clients = name, clients
        self.redundancy = Redundancy(prompts, page, cost)
        self.tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self.bodies = [
            orjson.dumps(
                {
                    "input_ids": prompt.token_ids.tolist(),
                    "sampling_params": {"max_new_tokens": 0},
                    "return_logprob": True,
                    "token_ids_logprob": LABELS,
                }
            )
            for prompt in prompts
        ]

    def about(self) -> dict[str, Any]:
        """Its size, for the record."""
        shared = sum(self.redundancy.shared)
        return {
            "requests": len(self.bodies),
            "clients": self.clients,
            "tokens": self.tokens,
            "shared_tokens": shared,
        }


def make_loads(
    cost: ModelCost,
    *,
    vocabulary: int,
    page: int,
    seed: int,
    quick: bool,
    trace: Path | None,
    scale: float,
    keep: float,
) -> list[Load]:
    """The few-shot mix, long inputs, and a trace (of that file, or conversations of the same shape)."""
    few = few_shot_mix(
        24 if quick else 240,
        seed=seed,
        tasks=4 if quick else 16,
        prefix_tokens=(60, 140) if quick else (600, 1400),
        suffix_tokens=(10, 30) if quick else (40, 120),
    )
    long = long_inputs(6 if quick else 120, seed=seed, tokens=(100, 140) if quick else (1000, 1400))
    if trace is not None:
        replay = read_trace(trace, limit=24 if quick else 90, scale=scale, keep=keep)
        name = f"trace {trace.name}"
    else:
        turn = (20, 60) if quick else (40, 260)
        replay = conversations(6 if quick else 24, seed=seed, turns=4, system_tokens=32, turn_tokens=turn)
        name = "conversations (generated)"
    loads = []
    for label, prompts, clients in (("few-shot mix", few, 64), ("long inputs", long, 64), (name, replay, 16)):
        _into_vocabulary(prompts, vocabulary)
        loads.append(Load(label, prompts, clients, page, cost))
    return loads


def _into_vocabulary(prompts: Sequence[TimedPrompt], vocabulary: int) -> None:
    for prompt in prompts:
        for at, token in enumerate(prompt.token_ids):
            prompt.token_ids[at] = token % (vocabulary - 10) + 3


@dataclass
class Answers:
    """What the clients saw, by request.

    `processor_by_role`: seconds of ranks, fronts and routers, without the clients. Beside the seconds of the clock they
    say what a side costs also where other work takes its time slices.
    """

    seconds: float
    processor_by_role: dict[str, float]
    latencies: list[float]
    cached: list[int]
    ranks: list[str]
    log_probabilities: list[list[float]]

    def figures(self, load: Load, rank_count: int) -> dict[str, Any]:
        """Of this run, with the raw counts behind them."""
        ordered = sorted(self.latencies)
        return {
            "seconds": self.seconds,
            "processor_seconds": sum(self.processor_by_role.values()),
            "requests_per_processor_s": len(ordered) / sum(self.processor_by_role.values()),
            "processor_ms_a_request": {
                role: 1000 * seconds / len(ordered) for role, seconds in self.processor_by_role.items()
            },
            "requests_per_s": len(ordered) / self.seconds,
            "tokens_per_s": load.tokens / self.seconds,
            "p50_s": statistics.median(ordered),
            "p99_s": ordered[int(0.99 * (len(ordered) - 1))],
            **asdict(load.redundancy.judge(self.cached, self.ranks, rank_count)),
            "cached_tokens_by_request": orjson.dumps(self.cached).decode(),
        }


def session(url: str) -> aiohttp.ClientSession:
    """A client without a bound on connections: httpx looks at every connection whenever a request begins or ends."""
    timeout = aiohttp.ClientTimeout(total=600)
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=timeout, raise_for_status=True)


async def send(url: str, load: Load, share: float = 1.0) -> Answers:
    """Sends the load, or its first part.

    Raises:
        aiohttp.ClientResponseError: a request was refused: the figures would mean nothing.
    """
    count = max(1, int(len(load.bodies) * share))
    answers = Answers(0.0, {}, [0.0] * count, [0] * count, [""] * count, [[]] * count)
    waiting = iter(range(count))
    headers = {"content-type": "application/json"}

    async def client() -> None:
        for number in waiting:
            began = time.perf_counter()
            async with http.post("/generate", data=load.bodies[number], headers=headers) as answer:
                content = await answer.read()
            answers.latencies[number] = time.perf_counter() - began
            info = orjson.loads(content)["meta_info"]
            answers.cached[number] = info["cached_tokens"]
            rank = info.get("dp_rank")
            answers.ranks[number] = str(info["weight_version"] if rank is None else rank)
            answers.log_probabilities[number] = [entry[0] for entry in info["output_token_ids_logprobs"][0]]

    async with session(url) as http:
        began, used = time.perf_counter(), processor_seconds_by_role(os.getpid())
        await asyncio.gather(*(client() for _ in range(load.clients)))
        answers.seconds = time.perf_counter() - began
        for role, spent in processor_seconds_by_role(os.getpid()).items():
            answers.processor_by_role[role] = spent - used.get(role, 0.0)
    return answers


def difference(one: Answers, other: Answers) -> dict[str, float]:
    """How far two sides' log-probabilities lie apart, in nats.

    `mean`, `max`: of the same prompts. `between_prompts`: the mean of each prompt's against the next one's, which is
    what mixed-up answers would show.
    """
    mine, theirs = one.log_probabilities, other.log_probabilities
    apart = _apart(mine, theirs)
    return {
        "mean": statistics.fmean(apart),
        "max": max(apart),
        "between_prompts": statistics.fmean(_apart(mine, theirs[1:] + theirs[:1])),
    }


def _apart(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> list[float]:
    return [
        abs(mine - theirs)
        for row, other in zip(some, others, strict=True)
        for mine, theirs in zip(row, other, strict=True)
    ]
