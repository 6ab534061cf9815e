"""Who is admitted, who counts as alive, and when a group can no longer answer."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.experts.group.membership import Membership
from asyncep_sgl.experts.group.peers import Card, NodeView, View
from asyncep_sgl.experts.shard.layout import GroupLayout
from asyncep_sgl.strategies.group_gate import GroupGate, GroupHealth, uncovered


def card(node: int, incarnation: int = 1, **changes: object) -> Card:
    found = Card(
        node=node,
        incarnation=incarnation,
        address=f"tcp://host{node}:5000",
        launcher=f"server on {node}",
        nodes=3,
        ranks=2,
        copies=1,
        resident_layers=1,
        resident_experts=0,
        model="m",
        version="1",
    )
    return msgspec.structs.replace(found, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "x"}, "same checkpoint"),
        ({"ranks": 4}, "ranks is 4 on node 1 and 2 on node 0; give every host the same --dp-size"),
        ({"nodes": 4}, "--nnodes"),
        ({"copies": 2}, "--asyncep-copies"),
        ({"resident_layers": 0}, "--asyncep-resident-layers"),
        ({"resident_experts": 2}, "--asyncep-resident-experts"),
        ({"version": "2"}, "same version"),
    ],
)
def test_what_differs_is_refused_with_the_flag_to_change(changes: dict[str, object], words: str) -> None:
    book = Membership(card(0), patience=3)
    reason = book.admit(card(1, **changes), now=0)
    assert reason is not None
    assert words in reason
    assert not book.alive(1, 0)


def test_a_node_rank_is_given_once() -> None:
    book = Membership(card(0), patience=3)
    assert book.admit(card(1), now=0) is None
    other: dict[str, object] = {"address": "tcp://other:1", "launcher": "another server"}
    assert "--node-rank 1 is taken by tcp://host1:5000" in str(book.admit(card(1, 2, **other), now=1))
    assert "--node-rank 0 is taken" in str(book.admit(card(0, 2, **other), now=1))
    # The same server with a new exporter, on another port.
    assert book.admit(card(1, 3, address="tcp://host1:5001"), now=1) is None
    # Silent for longer than the patience: its successor may come, from anywhere.
    assert book.admit(card(1, 4, **other), now=5) is None
    assert "older one" in str(book.admit(card(1, 2, **other), now=6))


def test_hearsay_makes_known_but_not_alive() -> None:
    book = Membership(card(0), patience=3)
    book.learn([card(1), card(2)], now=10)
    assert book.alive(1, 12)
    assert not book.alive(2, 10)
    assert book.absent() == ()
    # A third host's older knowledge does not undo what a host said of itself.
    book.admit(card(2, 5, ready=True), now=11)
    book.learn([card(1), card(2, 5), card(2, 4)], now=12)
    assert book.card(2) == card(2, 5, ready=True)


@given(nodes=st.integers(2, 6), data=st.data())
def test_uncovered_is_what_the_layout_says(nodes: int, data: st.DataObject) -> None:
    copies = data.draw(st.integers(1, nodes))
    dead = data.draw(st.sets(st.integers(0, nodes - 1), max_size=nodes))
    layout = GroupLayout(experts=nodes * 2, nodes=nodes, ranks=1, copies=copies)
    held = set(itertools.chain.from_iterable(layout.held(0, node) for node in range(nodes) if node not in dead))
    assert uncovered(dead, nodes, copies) == (held != set(range(nodes * 2)))


def test_requests_wait_for_the_patience_and_are_then_refused() -> None:
    now = 0.0
    health = GroupHealth(nodes=2, copies=1, patience=5, clock=lambda: now)
    away = View((NodeView(1, "tcp://b:5000", False, None),), ())
    health.saw(away)
    now = 4.9
    health.saw(away)
    assert health.refusal() is None
    now = 5.0
    assert "node 1 (tcp://b:5000) have been out of reach for 5 s" in str(health.refusal())
    assert asyncio.run(_status(health, "POST", "/generate")) == 503
    assert asyncio.run(_status(health, "GET", "/health")) == 503
    assert asyncio.run(_status(health, "GET", "/asyncep/status")) == 200
    health.saw(View((NodeView(1, "tcp://b:5000", True, None),), ()))
    assert health.refusal() is None
    assert asyncio.run(_status(health, "GET", "/health")) == 200


async def _status(health: GroupHealth, method: str, path: str) -> int:
    """What the gate lets through gets a 200."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("nobody reads the body")

    async def send(message: Any) -> None:
        sent.append(message)

    await GroupGate(app, health)({"type": "http", "method": method, "path": path}, receive, send)
    return int(sent[0]["status"])
