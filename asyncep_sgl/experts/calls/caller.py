"""A rank's lines to the workers of other hosts: rows go out, their products come back, or they are late."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
import zmq

from asyncep_sgl.experts.calls.estimate import LATE_SECONDS, Estimate, Trust
from asyncep_sgl.experts.calls.frames import fingerprint, on, raw
from asyncep_sgl.experts.calls.messages import Answer, Call, Declined, decode_answer, encode
from asyncep_sgl.experts.group.peers import View
from asyncep_sgl.experts.group.view import ViewLine
from asyncep_sgl.process.zmq_end import ends_with

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0
# Without a sign of life from the other end for so long, a connection is taken for broken.
_HEARTBEAT_MS, _SILENT_MS = 1000, 3000
# Calls that may be on their way to one worker before a further one is refused.
_CALLS_UNDER_WAY = 64


@dataclass(eq=False)
class _Line:
    """To one host's worker, as long as it has this address."""

    node: int
    address: str
    socket: zmq.Socket[bytes]
    estimate: Estimate = field(default_factory=Estimate)
    trust: Trust = field(default_factory=Trust)
    missed_in: int = 0
    """The layer that it was late or wrong in last, by the number of that layer's first call."""
    busy: float = 0.0
    """Share of the host's cores that its own work has used of late, as it says."""


@dataclass(eq=False)
class Sent:
    """A call under way.

    Attributes:
        experts: that were asked for.
        rows: where their products belong, in the results of the layer.
        count: how many rows that are.
        left: how many of them have not come.
    """

    line: _Line
    number: int
    experts: Sequence[int]
    rows: Sequence[range]
    count: int
    since: float
    late_at: float
    left: int


@dataclass
class CallCounts:
    """What a rank's calls came to."""

    sent: int = 0
    rows: int = 0
    late: int = 0
    declined: int = 0
    digest_failures: int = 0
    wait_seconds: float = 0.0


class Caller:
    """For the one thread that computes.

    Args:
        views: asks this host's exporter who is there.
        verify: compare what comes with its sender's digest, and let the other end compare.
        clock: seconds.
    """

    def __init__(self, views: ViewLine, *, verify: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts = CallCounts()
        self._views = views
        self._verify = verify
        self._clock = clock
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._lines: dict[int, _Line] = {}
        self._sockets: list[zmq.Socket[bytes]] = []
        self._end = ends_with(self, self._context, self._sockets)
        self._number = 0
        self._oldest = 0
        self._look_at = 0.0

    def close(self) -> None:
        """Hangs up."""
        self._views.close()
        self._end()

    def look(self) -> None:
        """Finds workers that are new, or that have started anew. Asks every few seconds, and waits for no answer."""
        if (view := self._views.answer()) is not None:
            self._learn(view)
        if (now := self._clock()) >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._views.ask()

    def refresh(self) -> None:
        """The same now; waits a second for the answer."""
        self._views.ask()
        if (view := self._views.answer(1.0)) is not None:
            self._learn(view)

    def _learn(self, view: View) -> None:
        for node in view.nodes:
            known = self._lines.get(node.node)
            if known is not None and known.address != node.calls:
                self._hang_up(known)
            if node.calls and node.node not in self._lines:
                try:
                    self._lines[node.node] = self._connect(node.node, node.calls)
                except zmq.ZMQError as error:
                    logger.warning("node %d has its worker at %r: %s", node.node, node.calls, error)

    def able(self) -> frozenset[int]:
        """Hosts that are worth asking now."""
        now = self._clock()
        return frozenset(node for node, line in self._lines.items() if line.trust.may_be_asked(now))

    def busy(self) -> float:
        """How busy the hosts that may be asked are with work of their own, 0 to 1."""
        now = self._clock()
        found = [line.busy for line in self._lines.values() if line.trust.may_be_asked(now)]
        return sum(found) / len(found) if found else 1.0

    def begin(self) -> None:
        """A layer begins: nobody waits any more for what earlier ones sent."""
        self._oldest = self._number + 1

    def send(
        self,
        node: int,
        layer: int,
        counts: Mapping[int, int],
        rows: Sequence[range],
        hidden: torch.Tensor,
        order: torch.Tensor,
    ) -> Sent | None:
        """Sends rows of some experts; None if the host's worker takes none now.

        Args:
            counts: how many of each expert; experts ascending.
            rows: their places in the results of the layer, in that order.
            hidden: ``(tokens, H)`` contiguous, each distinct token once.
            order: ``(rows,)`` int32, the token of each row.
        """
        line = self._lines[node]
        self._number += 1
        states, places = raw(hidden), raw(order)
        call = Call(
            number=self._number,
            oldest=self._oldest,
            layer=layer,
            first=min(counts),
            counts=tuple(counts.get(expert, 0) for expert in range(min(counts), max(counts) + 1)),
            tokens=len(hidden),
            digest=fingerprint(states, places) if self._verify else 0,
        )
        try:
            line.socket.send_multipart([encode(call), states, places], zmq.NOBLOCK)
        except zmq.Again:
            # Not connected, or it has not taken earlier ones yet.
            return None
        now = self._clock()
        self.counts.sent += 1
        count = len(order)
        self.counts.rows += count
        late_at = now + line.estimate.late(count)
        return Sent(line, self._number, tuple(counts), rows, count, now, late_at, count)

    def collect(self, sent: Sequence[Sent], results: torch.Tensor) -> list[Sent]:
        """Waits until each call is answered or late, and puts the products in their places.

        Args:
            results: ``(rows of the layer, H)`` contiguous.

        Returns:
            Those that are late, or were declined: their rows are the caller's to compute.
        """
        began = self._clock()
        waiting = {(call.line, call.number): call for call in sent}
        late: list[Sent] = []
        # What has come while this rank computed is there at once.
        for line in {call.line for call in sent}:
            late += self._take(line, waiting, results, waited=False)
        for call in waiting.values():
            call.late_at = max(call.late_at, began + LATE_SECONDS)
        while waiting:
            now = self._clock()
            for key in [key for key, call in waiting.items() if call.late_at <= now]:
                late.append(self._given_up(waiting.pop(key), now))
            if not waiting:
                break
            due = min(call.late_at for call in waiting.values())
            ready = {socket for socket, _ in self._poller.poll(max(1, math.ceil((due - now) * 1000)))}
            for line in self._lines.values():
                if line.socket in ready:
                    late += self._take(line, waiting, results, waited=True)
        self.counts.wait_seconds += self._clock() - began
        return late

    def _given_up(self, call: Sent, now: float) -> Sent:
        self.counts.late += 1
        self._missed(call.line, now)
        call.line.estimate.took(call.count, now - call.since)
        logger.warning(
            "node %d has not answered after %.0f ms; its experts are fetched", call.line.node, (now - call.since) * 1e3
        )
        # It may have started anew.
        self._look_at = 0.0
        return call

    def _missed(self, line: _Line, now: float) -> None:
        """Once a layer, however many of its calls fail together."""
        if line.missed_in != self._oldest:
            line.missed_in = self._oldest
            line.trust.missed(now)

    def _take(
        self, line: _Line, waiting: dict[tuple[_Line, int], Sent], results: torch.Tensor, *, waited: bool
    ) -> list[Sent]:
        """Everything that has come on a line.

        Args:
            waited: it comes now; otherwise it may have been there for a while, and nothing is known of its time but
                that it was shorter.

        Returns:
            Calls that were declined or came wrong.
        """
        failed: list[Sent] = []
        while True:
            try:
                frames = line.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return failed
            try:
                message = decode_answer(frames[0].bytes)
            except msgspec.MsgspecError:
                logger.warning("something that is no worker answers for node %d", line.node)
                continue
            call = waiting.get((line, message.number))
            if call is None:
                continue  # it was late, and its rows have been computed here
            reason = (
                message.reason if isinstance(message, Declined) else self._place(call, message, frames[1:], results)
            )
            now = self._clock()
            if reason is not None:
                logger.warning("node %d: %s; its experts are fetched", line.node, reason)
                self.counts.declined += 1
                self._missed(line, now)
                failed.append(waiting.pop((line, call.number)))
            elif not call.left:
                seconds, expected = now - call.since, line.estimate.expected(call.count)
                if waited or expected is None or seconds < expected:
                    line.estimate.took(call.count, seconds)
                line.trust.answered()
                del waiting[line, call.number]
            if reason is None:
                # Whoever answers one call of several has not forgotten the others.
                for other in waiting.values():
                    if other.line is line:
                        other.late_at = max(other.late_at, now + line.estimate.late(other.count))

    def _place(self, call: Sent, answer: Answer, frames: Sequence[zmq.Frame], results: torch.Tensor) -> str | None:
        """Puts a part's products where they belong; what is wrong with them."""
        width = results.shape[1] * results.element_size()
        # Parts come in order, so that none is missing when the last is there.
        in_order = answer.row == call.count - call.left and 0 < answer.rows <= call.left
        if len(frames) != 1 or not in_order:
            return "its answer is not of the rows that it was asked for"
        buffer = frames[0].buffer
        if len(buffer) != answer.rows * width:
            return f"its answer has {len(buffer)} bytes for {answer.rows} rows"
        # 0 is of a host that does not check.
        if self._verify and answer.digest and fingerprint(buffer) != answer.digest:
            self.counts.digest_failures += 1
            return "its answer came otherwise than it was sent"
        _put(on(buffer, results.dtype, (answer.rows, results.shape[1])), answer.row, call.rows, results)
        call.left -= answer.rows
        call.line.busy = answer.busy
        return None

    def _connect(self, node: int, address: str) -> _Line:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = _CALLS_UNDER_WAY
        socket.rcvhwm = 0
        # What cannot be delivered now is not worth delivering later.
        socket.immediate = True
        socket.heartbeat_ivl, socket.heartbeat_timeout = _HEARTBEAT_MS, _SILENT_MS
        socket.connect(address)
        self._sockets.append(socket)
        self._poller.register(socket, zmq.POLLIN)
        return _Line(node, address, socket)

    def _hang_up(self, line: _Line) -> None:
        self._poller.unregister(line.socket)
        self._sockets.remove(line.socket)
        line.socket.close()
        del self._lines[line.node]


def _put(products: torch.Tensor, first: int, places: Sequence[range], results: torch.Tensor) -> None:
    """Writes the products of a call's rows from ``first`` on to where they belong."""
    before, done = 0, 0
    for place in places:
        start = max(0, first + done - before)
        count = min(len(place) - start, len(products) - done)
        if count > 0:
            at = place.start + start
            results[at : at + count] = products[done : done + count]
            done += count
        before += len(place)
