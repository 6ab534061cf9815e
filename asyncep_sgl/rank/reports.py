"""A rank's line to the router. SGLang's results go past the controller; this tells it what came of them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Any

import msgspec
import zmq
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.disaggregation.kv_events import EventBatch, EventPublisher
from typing_extensions import override

from asyncep_router.cost import ModelCost
from asyncep_sgl.process.zmq_end import ends_with
from asyncep_sgl.rank.cache_events import joined
from asyncep_sgl.router.wire import Beat, CacheEvents, Finished, RankMessage, Started, Threshold, encode

# Often enough that a router which waits ten seconds has missed nine.
_BEAT_SECONDS = 1.0


class RankReporter:
    """Sends reports and never waits: a rank must not stand still because the router does."""

    def __init__(self, rank: int, address: str, cost: ModelCost) -> None:
        self.rank = rank
        self._cost = cost
        context = zmq.Context()
        self._socket = context.socket(zmq.PUSH)
        ends_with(self, context, [self._socket])
        self._socket.linger = 0
        self._socket.set_hwm(0)
        self._socket.connect(address)

    def batch_started(self, number: int, batch: Any) -> None:
        """Reports SGLang's ``ScheduleBatch``, the ``number``-th, before anything of it is computed."""
        self._send(Started(self.rank, number, tuple(request.rid for request in batch.reqs)))

    def batch_done(self, batch: Any, seconds: float) -> None:
        """Reports SGLang's ``ScheduleBatch``, just processed, that took ``seconds``."""
        passes = list(zip(batch.extend_lens or (), batch.prefix_lens or (), strict=True))
        # Signs of life are asked past the router; it would not know them.
        finished = [r for r in batch.reqs if r.finished() and not r.rid.startswith(HEALTH_CHECK_RID_PREFIX)]
        self._send(
            Finished(
                rank=self.rank,
                rids=tuple(request.rid for request in finished),
                flops=float(self._cost.batch_flops(passes)),
                seconds=seconds,
                cached={request.rid: request.cached_tokens for request in finished},
                batch=batch.forward_iter,
            )
        )

    def threshold(self, layer_flops: float) -> None:
        """Tells the router this rank's T, in FLOPs per layer and batch."""
        self._send(Threshold(self.rank, layer_flops))

    def cache_changed(self, payload: bytes) -> None:
        """Passes on one publication of cache events."""
        self._send(CacheEvents(self.rank, payload))

    def _send(self, message: RankMessage) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            # No router there. It will learn from its ranks' deaths or its own; there is nobody to tell.
            return


def start_beating(rank: int, address: str) -> None:
    """Starts a thread that tells the router once a second, for as long as the process runs, that it does.

    It needs the interpreter for a moment only, which every kernel leaves to it.
    """

    def beat() -> None:
        message = encode(Beat(rank, os.getpid()))
        # A line of its own: a socket belongs to one thread.
        with zmq.Context() as context, context.socket(zmq.PUSH) as line:
            line.linger = 0
            line.connect(address)
            while True:
                with contextlib.suppress(zmq.Again):  # the router is not there
                    line.send(message, zmq.NOBLOCK)
                time.sleep(_BEAT_SECONDS)

    threading.Thread(target=beat, name="asyncep-beat", daemon=True).start()


class RouterEventPublisher(EventPublisher):  # type: ignore[misc] # upstream is untyped
    """SGLang's KV-cache events over the rank's own line, in order with its reports, instead of a TCP port a rank."""

    reporter: RankReporter | None = None
    join: bool = True  # pages of one prompt as one event: less to write, read and look up than one each

    def __init__(self, **_: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    @override
    def publish(self, events: EventBatch) -> None:
        """Sends one batch of events."""
        if self.reporter is not None:
            if self.join:
                events.events = joined(events.events)
            self.reporter.cache_changed(self._encoder.encode(events))

    @override
    def shutdown(self) -> None:
        """Nothing to do: the line ends with the rank."""
