"""The attack on a real process that dies of one body: it is found among the others, made small, and not sent again."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hostile.attack import Attack
from hostile.cases import Case
from hostile.feed import Feed
from hostile.schema import Field, Route

TOY = Path(__file__).parent / "toy_server.py"


class Toy:
    """A target of one process."""

    key = "k"
    secrets: Sequence[str] = ()

    def __init__(self) -> None:
        self.starts = 0
        self.urls: Sequence[str] = ()
        self._start(0)

    def _start(self, port: int) -> None:
        self.process = subprocess.Popen([sys.executable, str(TOY), str(port)], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.urls = (f"http://127.0.0.1:{int(self.process.stdout.readline())}",)
        self.starts += 1

    def processes(self) -> dict[str, int]:
        return {"toy": self.process.pid} if self.process.poll() is None else {}

    async def revive(self) -> None:
        if self.process.poll() is not None:
            self.stop()
            self._start(int(self.urls[0].rsplit(":", 1)[1]))

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Listed:
    """Cases of a list, over and over."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = itertools.cycle(cases)

    async def next(self) -> Case:
        return next(self._cases)


@pytest.fixture
def toy() -> Iterator[Toy]:
    made = Toy()
    yield made
    made.stop()


def case(**fields: int | list[int]) -> Case:
    body = {**fields, "filler": [1, 2, 3]}
    return Case("POST", "/x", json.dumps(body).encode(), tuple((name, str(value)) for name, value in fields.items()))


def test_what_kills_is_found_shrunk_and_not_sent_again(toy: Toy) -> None:
    harmless = [case(ok=number) for number in range(30)]
    cases = [*harmless[:20], case(die=2**40), case(bad=2**50), *harmless[20:]]

    async def attack() -> Attack:
        run = Attack(toy, Listed(cases), in_flight=4, most_ends=5)
        await run.run(seconds=60, requests=200)
        await run.shrink(60)
        return run

    score = asyncio.run(attack()).score
    assert score.sent == 200
    assert score.skipped >= 5
    assert score.deaths == score.ends == 1
    by_fault = {finding.wrong: finding for finding in score.findings.values()}
    assert by_fault.keys() == {"500", "a process died of it"}
    assert by_fault["500"].count >= 5
    for wrong, field in (("500", "bad"), ("a process died of it", "die")):
        shrunk = by_fault[wrong].shrunk
        assert shrunk is not None
        assert json.loads(shrunk.content).keys() == {field}
        assert field in by_fault[wrong].record()["command"]


def test_an_attack_ends_when_the_target_has_ended_too_often(toy: Toy) -> None:
    cases = [case(die=2**40 + number, other=number) for number in range(50)]

    async def attack() -> Attack:
        run = Attack(toy, Listed(cases), in_flight=2, most_ends=2)
        await run.run(seconds=60, requests=10_000)
        return run

    assert asyncio.run(attack()).score.ends == 2


def test_an_attack_of_nothing_wrong_finds_nothing(toy: Toy) -> None:
    async def attack() -> Attack:
        run = Attack(toy, Listed([case(ok=1), case(ok=2)]), in_flight=3, most_ends=1)
        await run.run(seconds=60, requests=100)
        return run

    score = asyncio.run(attack()).score
    assert (score.sent, score.deaths, score.findings) == (100, 0, {})
    assert score.statuses == {"200": 100}


def test_a_feed_makes_the_cases_of_its_seed() -> None:
    fields = (Field(("n",), {"type": "integer"}), Field(("s",), {"type": "string"}))
    route = Route("POST", "/x", fields, ())

    async def first(seed: int) -> list[Case]:
        async with Feed([route], seed) as feed:
            return [await feed.next() for _ in range(120)]

    assert asyncio.run(first(3)) == asyncio.run(first(3))
    assert asyncio.run(first(3)) != asyncio.run(first(4))
