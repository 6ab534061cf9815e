"""The decision log: one JSON line for every prompt sent."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from asyncep_router.http.fleet import Fleet
    from asyncep_router.messages import Dispatch


def log_decision(dispatch: Dispatch, fleet: Fleet, fill: float) -> None:
    """Write it to stdout. `fill`: FLOPs in flight on the rank, this one included, over T (0 if not kept)."""
    worker, dp_rank = fleet.by_rank[dispatch.rank]
    line = {
        "event": "decision",
        "time": time.time(),
        "request_id": dispatch.rid.rpartition("#")[0],
        "prompt": dispatch.rid,
        "worker": worker.url,
        "dp_rank": dp_rank,
        "reason": dispatch.reason.value,
        "tokens": len(dispatch.request.token_ids),
        "cached_tokens": dispatch.cached,
        "flops": dispatch.flops,
        "fill": round(fill, 4),
        "waited_seconds": round(dispatch.waited, 6),
    }
    sys.stdout.buffer.write(orjson.dumps(line) + b"\n")
    sys.stdout.buffer.flush()
