"""Prompts alone on one host: two ranks of which the idle one helps, or rests, and stock SGLang with two threads."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from stock_server import stock_server

from asyncep.local_server import local_server

HELP, REST, STOCK = "two ranks, the idle one helps", "two ranks, the idle one rests", "stock, two threads"
# Each side is started so often, in turn.
STARTS = 2
_FLAGS = ("--device", "cpu", "--skip-tokenizer-init", "--log-level", "error")

Alone = Callable[[str], tuple[dict[str, list[float]], list[Any]]]
"""Asks the server of a URL for prompts alone: seconds by length, and the log-probabilities of all."""


@contextmanager
def _server(name: str, model: Path) -> Iterator[str]:
    if name == STOCK:
        with stock_server(model, ["--skip-tokenizer-init"], tokens=16384) as url:
            yield url
    else:
        idle = "help" if name == HELP else "rest"
        with local_server(str(model), [*_FLAGS, "--dp-size", "2", "--asyncep-idle-ranks", idle]) as url:
            yield url


def one_host(
    model: Path, alone: Alone, environment: Mapping[str, str], starts: int = STARTS, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The record's part: ``seconds`` by side and length, and how many ``answers`` of the two ranks differ in a bit.

    Args:
        model: checkpoint folder.
        alone: what is asked of each.
        environment: variables of every server; how many threads it has is the side's own.
        starts: of each side.
        say: progress.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, list[Any]] = {}
    variables = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    with mock.patch.dict(os.environ, variables):
        for _ in range(starts):
            for name in (HELP, REST, STOCK):
                with _server(name, model) as url:
                    found, given = alone(url)
                for tokens, each in found.items():
                    seconds.setdefault(name, {}).setdefault(tokens, []).extend(each)
                answers.setdefault(name, []).extend(given)
                medians = ", ".join(f"{tokens}: {statistics.median(each) * 1e3:.0f}" for tokens, each in found.items())
                say(f"  {name}: ms {medians}")
    return {"seconds": seconds, "answers": len(answers[HELP]), "different": _different(answers[HELP], answers[REST])}


def _different(one: Sequence[Any], other: Sequence[Any]) -> int:
    return sum(mine != theirs for mine, theirs in zip(one, other, strict=True))
