"""Prompts to simulate and to bench with. Same seed, same prompts, on every machine."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

_WORDS = array("H", [0]).itemsize * 8


@dataclass(frozen=True, slots=True)
class TimedPrompt:
    """A prompt and its arrival (seconds from the start). `group`: prompts of one group share a prefix of
    `shared` tokens by construction; -1: shares nothing that is known of."""

    arrival: float
    token_ids: array[int]
    group: int = -1
    shared: int = 0


def random_tokens(rng: random.Random, count: int) -> array[int]:
    """`count` token ids below 65,536."""
    return array("q", array("H", rng.randbytes(count * _WORDS // 8)))


def few_shot_mix(
    requests: int,
    *,
    seed: int,
    tasks: int = 57,
    prefix_tokens: tuple[int, int] = (600, 2400),
    suffix_tokens: tuple[int, int] = (40, 200),
    rate: float | None = None,
) -> list[TimedPrompt]:
    """Classification with examples: `tasks` instruction prefixes, each followed by many questions.

    57 tasks of five examples each is MMLU's shape. Tasks are drawn evenly and mixed in time. `rate`:
    requests a second, Poisson; None: all at once, a batch job.
    """
    rng = random.Random(seed)
    prefixes = [random_tokens(rng, rng.randint(*prefix_tokens)) for _ in range(tasks)]
    prompts = []
    arrivals = _arrivals(rng, requests, rate)
    for arrival in arrivals:
        task = rng.randrange(tasks)
        tail = random_tokens(rng, rng.randint(*suffix_tokens))
        prompts.append(TimedPrompt(arrival, prefixes[task] + tail, task, len(prefixes[task])))
    return prompts


def long_inputs(
    requests: int, *, seed: int, tokens: tuple[int, int] = (8_000, 32_000), rate: float | None = None
) -> list[TimedPrompt]:
    """Long documents that share nothing, one answer each."""
    rng = random.Random(seed)
    arrivals = _arrivals(rng, requests, rate)
    return [TimedPrompt(arrival, random_tokens(rng, rng.randint(*tokens))) for arrival in arrivals]


def conversations(
    sessions: int,
    *,
    seed: int,
    turns: int = 5,
    system_tokens: int = 512,
    turn_tokens: tuple[int, int] = (200, 2500),
    rate: float = 1.0,
) -> list[TimedPrompt]:
    """Sessions that repeat all they said so far at every turn: the shape of the Mooncake trace."""
    rng = random.Random(seed)
    system = random_tokens(rng, system_tokens)
    prompts = []
    for session, start in enumerate(_arrivals(rng, sessions, rate / turns)):
        said, now = system, start
        for _ in range(rng.randint(1, 2 * turns - 1)):
            shared = len(said)
            said = said + random_tokens(rng, rng.randint(*turn_tokens))
            prompts.append(TimedPrompt(now, said, session, shared))
            now += rng.expovariate(1 / 30)
    return sorted(prompts, key=lambda prompt: prompt.arrival)


def _arrivals(rng: random.Random, count: int, rate: float | None) -> list[float]:
    if rate is None:
        return [0.0] * count
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times
