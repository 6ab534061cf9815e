"""Asks the router inside the engine for its state."""

from __future__ import annotations

import json
from typing import Any

import zmq

_PATIENCE_MS = 5000
# Asks for no more than `asyncep_sgl.front.rank_health` needs.
HEALTH = b"health"


def router_state(address: str) -> dict[str, Any]:
    """Queue, ranks, counters, as `asyncep_router.routing_policy.RoutingPolicy.snapshot` names them.

    Raises:
        TimeoutError: the router does not answer.
    """
    return _ask(address, b"", _PATIENCE_MS)


def router_health(address: str, patience_ms: int) -> dict[str, Any]:
    """Which ranks serve, which are being started, and how long each has been silent.

    Raises:
        TimeoutError: the router does not answer.
    """
    return _ask(address, HEALTH, patience_ms)


def _ask(address: str, question: bytes, patience_ms: int) -> dict[str, Any]:
    with zmq.Context() as context, context.socket(zmq.REQ) as line:
        line.linger = 0
        line.connect(address)
        line.send(question)
        if not line.poll(patience_ms):
            raise TimeoutError(f"the router did not answer in {patience_ms} ms")
        found: dict[str, Any] = json.loads(line.recv())
        return found
