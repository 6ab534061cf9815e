"""The parts of `bench/jobs.py` that ask the Runtime: many callers at once, a slow source, a thousand labels."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peer_start import flush_cache
from records import Claim

from asyncep.runtime.runtime import Runtime

_ROUNDS = 5
# Where a model writes no space before a word.
_PLACES: dict[str, dict[str, Any]] = {
    "in a chat turn": {"chat": True},
    "after a line break": {"template": "{text}\n\nSection of the newspaper ({labels}):\n"},
}
_LABELS = ["business", "entertainment", "politics", "sport", "technology"]
_STEMS = """football cricket tennis rugby golf music film theatre art book television radio travel food health money
bank trade oil gas energy climate weather science space computer phone internet game law crime police army war peace
election party minister parliament president king school university student teacher child woman man city country
world"""
_ENDINGS = """news report review story letter interview list guide history plan rules cost price market team group
award show week year"""


def callers(model: Path, texts: Sequence[str], rounds: int = _ROUNDS) -> dict[str, Any]:
    """Seconds of each, all rounds, both sides in turn, caches emptied before each."""
    some = [text[:200] for text in texts]
    with Runtime(str(model), dp_size=2, log_level="error", show_start=False) as runtime:
        runtime.classify(some, _LABELS)
        gathered = [_gathered(runtime, some, number) for number in range(rounds)]
        slow = [_first_answer(runtime, some) for _ in range(rounds)]
        masses = {place: _masses(runtime, some, options) for place, options in _PLACES.items()}
        many = [_many_labels(runtime, some[: len(some) // 8 or 1], number) for number in range(rounds)]
    return {
        "texts": len(some),
        "gather_over_list": gathered,
        "first_answer_s": slow,
        "labels": {"few": 50, "many": 50 * len(_ENDINGS.split())},
        "many_over_few": many,
        "label_mass": masses,
    }


def claims_of_callers(found: dict[str, Any]) -> list[Claim]:
    """What is claimed of them."""

    def ratio(runs: Sequence[dict[str, float]], one: str, other: str) -> float:
        return statistics.median(run[one] / run[other] for run in runs)

    gathered = ratio(found["gather_over_list"], "gather", "list")
    many = ratio(found["many_over_few"], "many", "few")
    first = statistics.median(found["first_answer_s"])
    masses = [
        Claim(f"labels' probability {place}, over that with a space before", pair["ours"] / pair["space"], 2.0, "ratio")
        for place, pair in found["label_mass"].items()
    ]
    return [
        *masses,
        Claim("calls of one text in a gather over one call with all", gathered, 1.1, "ratio", at_least=False),
        Claim("first answer of a source that gives a text a second", first, 0.5, "s", at_least=False),
        Claim("1,000 labels with shared stems over 50", many, 3.0, "ratio", at_least=False),
    ]


def _masses(runtime: Runtime, texts: Sequence[str], options: dict[str, Any]) -> dict[str, float]:
    """Mean probability that the model writes one of the labels, as they are written and with a space before."""
    spaced = {label: [f" {label}"] for label in _LABELS}

    def mean(**more: Any) -> float:
        found = runtime.classify(list(texts), _LABELS, **options, **more)
        return statistics.mean(answer.label_mass or 0.0 for answer in found)

    return {"ours": mean(), "space": mean(words=spaced)}


def _timed(runtime: Runtime, work: Callable[[], object]) -> float:
    flush_cache(runtime.url)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _in_turn(runtime: Runtime, sides: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    names = list(sides)
    return {name: _timed(runtime, sides[name]) for name in (names if number % 2 == 0 else names[::-1])}


def _gathered(runtime: Runtime, texts: Sequence[str], number: int) -> dict[str, float]:
    async def gather() -> None:
        await asyncio.gather(*(runtime.aclassify([text], _LABELS) for text in texts))

    sides: dict[str, Callable[[], object]] = {
        "gather": lambda: asyncio.run(gather()),
        "list": lambda: runtime.classify(list(texts), _LABELS),
    }
    return _in_turn(runtime, sides, number)


def _first_answer(runtime: Runtime, texts: Sequence[str]) -> float:
    given: list[float] = []

    def source() -> Iterator[str]:
        for text in texts[:3]:
            given.append(time.perf_counter())
            yield text
            time.sleep(1.0)

    results = runtime.classify(source(), _LABELS)
    next(results)
    seconds = time.perf_counter() - given[0]
    list(results)
    return seconds


def _many_labels(runtime: Runtime, texts: Sequence[str], number: int) -> dict[str, float]:
    stems, endings = _STEMS.split()[:50], _ENDINGS.split()
    few = [f"{stem} {endings[0]}" for stem in stems]
    many = [f"{stem} {ending}" for stem in stems for ending in endings]
    # The labels do not stand in the prompt: it is the same for both.
    template = "What is this text about?\n\nText: {text}\nIt is a"
    sides: dict[str, Callable[[], object]] = {
        "many": lambda: runtime.classify(list(texts), many, template=template),
        "few": lambda: runtime.classify(list(texts), few, template=template),
    }
    return _in_turn(runtime, sides, number)
