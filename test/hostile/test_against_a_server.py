"""A server and a router in front of it: what once hurt them, a short fuzz and a short soak, none of which may.

`regressions.jsonl` has one request a line: its body in parts (a part with a number is repeated so often), and the
classes of status that are right. What a fuzz finds goes there, in its smallest form.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import soak
from hostile.cases import Case
from hostile.honest import Clients, answers, questions
from hostile.model import hostile_model
from hostile.oracle import verdict
from hostile.servers import place
from hostile.stand import Stand
from hostile.wire import send
from records import Claim

pytestmark = pytest.mark.server

REGRESSIONS = [json.loads(line) for line in (Path(__file__).parent / "regressions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both() -> Iterator[Stand]:
    with place() as here:
        made = Stand(here, hostile_model())
        try:
            asyncio.run(made.ready())
            yield made
        finally:
            assert made.stop() == []
        assert here.left_running() == []
        assert here.left_on_disk() == []


def case_of(row: dict[str, Any]) -> Case:
    parts = [part if isinstance(part, str) else part[0] * part[1] for part in row["body"]]
    return Case(row["method"], row["path"], "".join(parts).encode() or None, (("body", row["name"]),))


async def replayed(both: Stand, url: str) -> dict[str, str]:
    """What is wrong with each request's answer, while another client asks and is answered right."""
    asked = questions(5, 1)
    expected = await answers(both.server.url, asked, both.key)
    wrong = {}
    async with Clients(both.server.url, asked, expected, both.key, 1) as beside:
        for row in REGRESSIONS:
            case = case_of(row)
            before = both.processes()
            outcome = await send(url, case, both.key)
            status = f"{(outcome.status or 0) // 100}xx"
            problem = verdict(case, outcome, both.secrets)
            if problem or status not in row["expect"]:
                said = outcome.body[:200].decode(errors="replace")
                wrong[row["name"]] = f"{problem or 'status'}: {outcome.status} {outcome.error} {said}"
            if both.processes() != before:
                wrong[row["name"]] = f"a process died: {before} {both.processes()}"
                await both.revive()
    for what in ("wrong", "refused", "lost"):
        if beside.tally.counts[what]:
            wrong[f"beside: {what}"] = str(beside.tally.summary())
    return wrong


@pytest.mark.parametrize("face", [0, 1], ids=["server", "router"])
def test_what_once_hurt_is_refused_and_hurts_nobody(both: Stand, face: int) -> None:
    assert asyncio.run(replayed(both, both.urls[face])) == {}


def unmet(claims: list[Claim], but: tuple[str, ...] = ()) -> dict[str, float]:
    return {claim.name: claim.value for claim in claims if not claim.holds and claim.name not in but}


def test_a_short_fuzz_finds_nothing(both: Stand) -> None:
    raw, claims = asyncio.run(fuzz.attack(both, fuzz.options(["--quick", "--seconds", "25"])))
    assert raw["findings"] == []
    # How many there are in so few seconds, and how long one takes beside them, is the machine's to say.
    assert unmet(claims, but=("hostile requests sent", "slowest of them")) == {}
    assert sum(raw["statuses"].values()) > 50


def test_a_short_soak_loses_nothing(both: Stand) -> None:
    """So few seconds are too short for memory to have settled: how much there is is the long one's to say."""
    raw, claims = asyncio.run(soak.soaked(both, soak.options(["--quick", "--seconds", "15"])))
    memory, descriptors = (
        "largest growth of a process's memory once settled",
        "processes whose descriptors are not as many",
    )
    assert unmet(claims, but=("seconds of load", memory, descriptors)) == {}
    assert {"launcher", "front", "controller", "rank 0", "rank 1", "detokenizer", "http router"} <= raw["growth"].keys()
    assert all(before is not None and after is not None for before, after in raw["descriptors"].values())
