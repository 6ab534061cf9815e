"""Asks the router inside the engine for its state."""

from __future__ import annotations

import json
from typing import Any

import zmq

_PATIENCE_MS = 5000


def router_state(address: str) -> dict[str, Any]:
    """Queue, ranks, counters, as `asyncep_router.policy.Frontend.snapshot` names them.

    Raises:
        TimeoutError: the router does not answer.
    """
    with zmq.Context() as context, context.socket(zmq.REQ) as line:
        line.linger = 0
        line.connect(address)
        line.send(b"")
        if not line.poll(_PATIENCE_MS):
            raise TimeoutError(f"the router did not answer in {_PATIENCE_MS} ms")
        found: dict[str, Any] = json.loads(line.recv())
        return found
