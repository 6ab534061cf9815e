"""The MoE-Prefill paper's workloads (arXiv 2605.02960), rebuilt as distributions of lengths and sharing.

From the paper: the six data sets of the real mix, its 73.8 thousand requests and 37.9 million tokens; that the
synthetic workloads share nothing and come in four lengths. Everything else in `DATASETS` and `SYNTHETIC_TOKENS`
is assumed (no text of the paper gives it): how the requests divide over the data sets (public sizes of MMLU's
test set, IMDB's test set, MoralStories' stories times two, QuALITY's development questions and articles; BoolQ
and ArXiv-classification take what is left of requests and tokens), how long instructions, examples and texts
are, and what the four lengths are.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from asyncep.sim.workloads import TimedPrompt, random_tokens
from asyncep_router.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

REQUESTS = 73_800
"""Requests of the real mix (the paper's figure)."""
TOKENS = 37_900_000
"""Prompt tokens of the real mix (the paper's figure)."""
LONGEST = 131_072
"""No prompt is longer: 128K tokens."""


@dataclass(frozen=True)
class Dataset:
    """Requests over one data set.

    `groups`: sets of requests with a common prefix (subjects, articles, or 1: one instruction for all).
    `prefix`: mean tokens of a group's prefix; `own`: mean tokens after it. Both log-normal, with the standard
    deviations `prefix_spread` and `own_spread` of the logarithm. `fills`: its texts' lengths are scaled so that the
    mix as a whole has the paper's tokens.
    """

    name: str
    requests: int
    groups: int
    prefix: float
    own: float
    prefix_spread: float = 0.0
    own_spread: float = 0.4
    fills: bool = False


DATASETS = (
    Dataset("moral-stories", 24_000, 1, 40, 110, own_spread=0.25),
    Dataset("mmlu", 14_042, 57, 420, 100, prefix_spread=0.5, own_spread=0.6),
    Dataset("boolq", 8_022, 1, 60, 150, own_spread=0.45),
    Dataset("imdb", 25_000, 1, 40, 300, own_spread=0.65),
    Dataset("quality", 2_086, 115, 5_000, 90, prefix_spread=0.2),
    Dataset("arxiv-classification", 650, 1, 80, 9_500, own_spread=0.7, fills=True),
)

SYNTHETIC_TOKENS = {"short": 512, "medium": 4_096, "long": 32_768, "ultra-long": 131_072}
"""Tokens of a prompt; the names are the paper's, the numbers are assumed."""


def real_mix(
    *,
    seed: int,
    scale: float = 1.0,
    length_scale: float = 1.0,
    rate: float | None = None,
    datasets: Sequence[Dataset] = DATASETS,
) -> list[TimedPrompt]:
    """The real mix, requests of all data sets shuffled together.

    `scale`: share of the requests (and of the groups, so that a group keeps its size). `length_scale`: factor on
    all lengths, for small machines. `rate`: requests a second, Poisson; None: all at once. Raises `ConfigError`.
    """
    _positive("scale", scale)
    _positive("length_scale", length_scale)
    rng = random.Random(seed)
    drawn: list[tuple[int, int, int]] = []  # group, tokens of its prefix, own tokens
    fillers: list[int] = []
    groups = 0
    for data in datasets:
        count = max(1, round(data.requests * scale))
        lengths = [_draw(rng, data.prefix, data.prefix_spread) for _ in range(max(1, round(data.groups * scale)))]
        for _ in range(count):
            group = rng.randrange(len(lengths))
            if data.fills:
                fillers.append(len(drawn))
            drawn.append((groups + group, lengths[group], _draw(rng, data.own, data.own_spread)))
        groups += len(lengths)
    if fillers and tuple(datasets) == DATASETS:
        drawn = _filled(drawn, fillers, TOKENS * len(drawn) // REQUESTS)
    rng.shuffle(drawn)
    prefixes: dict[int, array[int]] = {}
    prompts = []
    for arrival, (group, prefix, own) in zip(_poisson(rng, len(drawn), rate), drawn, strict=True):
        prefix = max(1, round(prefix * length_scale))
        if group not in prefixes:
            prefixes[group] = random_tokens(rng, prefix)
        tail = random_tokens(rng, max(1, round(min(own, LONGEST) * length_scale)))
        prompts.append(TimedPrompt(arrival, prefixes[group] + tail, group, prefix))
    return prompts


def synthetic(
    name: str, requests: int, *, seed: int, spread: float = 0.0, length_scale: float = 1.0, rate: float | None = None
) -> list[TimedPrompt]:
    """Prompts of one of the four lengths that share nothing.

    `spread`: standard deviation of the length's logarithm; 0: all alike. Raises `ConfigError`.
    """
    if name not in SYNTHETIC_TOKENS:
        raise ConfigError(f"synthetic workload {name!r}: known are {', '.join(SYNTHETIC_TOKENS)}")
    _positive("length_scale", length_scale)
    rng = random.Random(seed)
    mean = SYNTHETIC_TOKENS[name] * length_scale
    arrivals = _poisson(rng, requests, rate)
    return [TimedPrompt(arrival, random_tokens(rng, _draw(rng, mean, spread))) for arrival in arrivals]


def with_arrivals(prompts: Sequence[TimedPrompt], *, seed: int, rate: float | None) -> list[TimedPrompt]:
    """The same prompts, in the same order, arriving at once (`rate` None) or Poisson at `rate` a second."""
    times = _poisson(random.Random(seed), len(prompts), rate)
    return [replace(prompt, arrival=time) for prompt, time in zip(prompts, times, strict=True)]


def scaled(prompts: Iterable[TimedPrompt], *, length_scale: float = 1.0, speed: float = 1.0) -> list[TimedPrompt]:
    """A trace made smaller: every prompt cut to `length_scale` of its tokens, arrivals `speed` times as fast.

    Prompts keep the share of their tokens that they have in common only where that is a prefix of both cuts.
    """
    _positive("length_scale", length_scale)
    _positive("speed", speed)
    out = []
    for prompt in prompts:
        keep = max(1, round(len(prompt.token_ids) * length_scale))
        shared = min(keep, round(prompt.shared * length_scale))
        out.append(TimedPrompt(prompt.arrival / speed, prompt.token_ids[:keep], prompt.group, shared))
    return out


def _filled(drawn: list[tuple[int, int, int]], fillers: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """Scale the fillers' own tokens (at most by 3 either way) so that all come to `tokens`."""
    filling = sum(drawn[i][2] for i in fillers)
    others = sum(prefix + own for _, prefix, own in drawn) - filling
    factor = min(3.0, max(1 / 3, (tokens - others) / filling))
    for i in fillers:
        group, prefix, own = drawn[i]
        drawn[i] = (group, prefix, max(1, round(own * factor)))
    return drawn


def _draw(rng: random.Random, mean: float, spread: float) -> int:
    """A log-normal length with this mean, at least 1 and at most `LONGEST`."""
    if not spread:
        return min(LONGEST, max(1, round(mean)))
    return min(LONGEST, max(1, round(rng.lognormvariate(math.log(mean) - spread * spread / 2, spread))))


def _poisson(rng: random.Random, count: int, rate: float | None) -> list[float]:
    if rate is None:
        return [0.0] * count
    _positive("rate", rate)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def _positive(name: str, value: float) -> None:
    if not value > 0 or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: must be above 0")
