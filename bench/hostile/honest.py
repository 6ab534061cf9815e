"""Well-behaved clients: questions whose right answers were found while nothing disturbed, asked again and compared."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hostile.cases import Case
from hostile.model import VOCABULARY
from hostile.oracle import Outcome
from hostile.wire import send

# The servers compute in fp32: sums in another order, as batches of another size give, differ this little. Answers of
# two prompts differ by whole nats.
TOLERANCE = 1e-3
_LABELS = [3, 40, 500]
_PAUSE = 0.02


@dataclass(frozen=True)
class Question:
    """A request, and where in its answer the numbers are that must be right."""

    path: str
    body: dict[str, Any]
    numbers: Callable[[Any], list[float]]

    def case(self) -> Case:
        return Case("POST", self.path, json.dumps(self.body).encode())


def questions(count: int, seed: int, longest: int = 400) -> list[Question]:
    """Singles and lists, ids and text, on the routes that people use; the same ones for the same ``seed``."""
    numbers = random.Random(seed)

    def prompt(most: int = longest) -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(numbers.randrange(5, most))]

    found = []
    for number in range(count):
        words = " ".join(f"w{numbers.randrange(1000)}" for _ in range(20))
        ask = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        forms = (
            Question("/generate", {"input_ids": prompt(), **ask, "token_ids_logprob": _LABELS}, _generated),
            Question("/generate", {"text": words, **ask, "token_ids_logprob": _LABELS}, _generated),
            Question("/generate", {"input_ids": [prompt(80) for _ in range(4)], **ask,
                                   "token_ids_logprob": [_LABELS] * 4}, _generated),
            Question("/v1/score", {"query": words, "items": [" a", " b"], "label_token_ids": _LABELS}, _scored),
            Question("/v1/completions", {"model": "default", "prompt": words, "max_tokens": 0, "echo": True,
                                         "logprobs": 1}, _completed),
        )  # fmt: skip
        found.append(forms[number % len(forms)])
    return found


def _generated(answer: Any) -> list[float]:
    answers = answer if isinstance(answer, list) else [answer]
    return [entry[0] for one in answers for entry in one["meta_info"]["output_token_ids_logprobs"][0]]


def _scored(answer: Any) -> list[float]:
    return [math.log(max(score, 1e-30)) for row in answer["scores"] for score in row]


def _completed(answer: Any) -> list[float]:
    return [value for value in answer["choices"][0]["logprobs"]["token_logprobs"] if value is not None]


@dataclass
class Tally:
    """What clients got. ``faults`` has the first answers that were neither right nor refused with a reason.

    Attributes:
        counts: right, wrong, refused, lost.
        seconds: each answered request took.
        began: when each of ``seconds`` began, by `time.monotonic`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    began: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, question: Question, expected: Sequence[float], outcome: Outcome, began: float) -> str:
        """Counts an outcome and returns as what."""
        what = judged(question, expected, outcome)
        self.counts[what] += 1
        if what == "right":
            self.seconds.append(outcome.seconds)
            self.began.append(began)
        elif what == "refused":
            self.refusals[f"{outcome.status} {outcome.body[:160].decode(errors='replace')}"] += 1
        elif what == "lost":
            self.losses[outcome.error or str(outcome.status)] += 1
        if what in ("wrong", "lost") and len(self.faults) < 20:
            said = _difference(question, expected, outcome) or outcome.body[:300].decode(errors="replace")
            self.faults.append(
                f"{what}: {question.path} {outcome.status} {outcome.error} {said} ({outcome.seconds:.1f} s)"
            )
        return what

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.seconds)

        def at(share: float) -> float | None:
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else None

        return {
            **{what: self.counts[what] for what in ("right", "wrong", "refused", "lost")},
            "p50_s": at(0.5),
            "p95_s": at(0.95),
            "max_s": at(1.0),
            # Seconds taken, and when they began on the clock of the run.
            "slowest": sorted(
                (
                    (round(took, 2), round(at - self.began[0], 1))
                    for took, at in zip(self.seconds, self.began, strict=True)
                ),
                reverse=True,
            )[:10],
            "refusals": dict(self.refusals.most_common(5)),
            "losses": dict(self.losses),
            "faults": self.faults,
        }


def judged(question: Question, expected: Sequence[float], outcome: Outcome) -> str:
    """``right``, ``wrong``, ``refused`` (4xx, 503, or the 500 of a request that a rank died of: with a reason), or
    ``lost``. Pure."""
    if outcome.status is None:
        return "lost"
    if outcome.status != 200:
        known = outcome.status < 500 or outcome.status == 503 or b"quarantined" in outcome.body
        return "refused" if known and outcome.body.strip() else "lost"
    try:
        numbers = question.numbers(json.loads(outcome.body))
    except (ValueError, KeyError, IndexError, TypeError):
        return "wrong"
    return "right" if agree(numbers, expected) else "wrong"


def _difference(question: Question, expected: Sequence[float], outcome: Outcome) -> str:
    """How far numbers that are wrong lie from the right ones."""
    try:
        numbers = question.numbers(json.loads(outcome.body))
    except (ValueError, KeyError, IndexError, TypeError):
        return ""
    if len(numbers) != len(expected):
        return f"{len(numbers)} numbers, not {len(expected)}"
    apart = [abs(one - other) for one, other in zip(numbers, expected, strict=True)]
    return f"up to {max(apart):.4g} off, {sum(a > TOLERANCE for a in apart)} of {len(apart)} numbers"


def agree(numbers: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two answers are the same but for the order in which sums were taken."""
    return len(numbers) == len(expected) and all(
        abs(one - other) <= TOLERANCE * max(1.0, abs(other)) for one, other in zip(numbers, expected, strict=True)
    )


async def answers(url: str, asked: Sequence[Question], key: str | None) -> list[list[float]]:
    """The right answers, one question at a time.

    Raises:
        RuntimeError: the undisturbed server does not answer one.
    """
    found = []
    for question in asked:
        outcome = await send(url, question.case(), key)
        if outcome.status != 200:
            raise RuntimeError(f"{question.path} undisturbed: {outcome.status} {outcome.error} {outcome.body[:500]!r}")
        found.append(question.numbers(json.loads(outcome.body)))
    return found


class Clients:
    """So many clients that each ask one question after the other, until they are stopped."""

    def __init__(
        self, url: str, asked: Sequence[Question], expected: Sequence[Sequence[float]], key: str | None, count: int
    ) -> None:
        self.tally = Tally()
        self._url, self._key = url, key
        self._asked, self._expected = asked, expected
        self._count = count
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Clients:
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Each ends with the answer that it waits for."""
        self._stopping.set()
        await asyncio.gather(*self._tasks)

    async def answered(self, more: int, within: float = 120.0) -> None:
        """Returns once so many more questions have been answered.

        Raises:
            TimeoutError: not in time.
        """
        wanted = self.tally.counts["right"] + more
        async with asyncio.timeout(within):
            while self.tally.counts["right"] < wanted:
                await asyncio.sleep(_PAUSE)

    async def _run(self, number: int) -> None:
        at = number
        while not self._stopping.is_set():
            index = at % len(self._asked)
            at += 1
            began = time.monotonic()
            outcome = await send(self._url, self._asked[index].case(), self._key)
            if self.tally.note(self._asked[index], self._expected[index], outcome, began) in ("refused", "lost"):
                # As a client does that was refused: nobody asks again in the same millisecond.
                await asyncio.sleep(0.2)
