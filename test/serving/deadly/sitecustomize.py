"""On the path of a server's processes: ranks that die of what a test sends, as they would of a fault of their own.

Python imports this when it starts. It changes nothing until a process is forked that has SGLang's scheduler.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

BEFORE = [11, 13, 17, 19, 23]
FORWARD = [11, 13, 17, 19, 29]


def _die() -> None:
    # Whoever is told something is told it before.
    signal.sigtimedwait([], 0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _arm() -> None:
    scheduler = sys.modules.get("sglang.srt.managers.scheduler")
    worker = sys.modules.get("sglang.srt.managers.tp_worker")
    if scheduler is None or worker is None or hasattr(scheduler, "_armed_by_a_test"):
        return
    scheduler._armed_by_a_test = True  # type: ignore[attr-defined]
    take = scheduler.Scheduler.handle_generate_request
    forward = worker.TpModelWorker.forward_batch_generation

    def handle_generate_request(self: Any, recv_req: Any) -> Any:
        if list(recv_req.input_ids[:5]) == BEFORE:
            _die()
        return take(self, recv_req)

    def forward_batch_generation(self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if any(list(request.origin_input_ids[:5]) == FORWARD for request in batch.reqs):
            _die()
        return forward(self, batch, *args, **kwargs)

    scheduler.Scheduler.handle_generate_request = handle_generate_request
    worker.TpModelWorker.forward_batch_generation = forward_batch_generation


os.register_at_fork(after_in_child=_arm)
