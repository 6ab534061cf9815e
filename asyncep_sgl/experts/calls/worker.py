"""The process that computes other hosts' rows with this host's experts.

It stands beside the exporter: the launcher's memory is mapped, SGLang is not imported, so its restart takes as long as
torch's import. Nobody depends on it: a caller whose rows do not come back in time fetches the experts.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import zmq

from asyncep_kernels.moe import cpu
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.calls.busy import Busy
from asyncep_sgl.experts.calls.frames import fingerprint, on, raw
from asyncep_sgl.experts.calls.merge import Rows, merge
from asyncep_sgl.experts.calls.messages import Answer, Call, Declined, Shape, ToCaller, decode_call, encode, fault
from asyncep_sgl.experts.calls.queue import CallQueue, Waiting
from asyncep_sgl.experts.group.link import link_host
from asyncep_sgl.experts.group.peers import Works
from asyncep_sgl.experts.group.peers import encode as encode_peer
from asyncep_sgl.experts.store.client import begin_side_process
from asyncep_sgl.experts.store.messages import Done, Export, ExportRequest, Failed, ServedReport
from asyncep_sgl.process.segment import map_segment

logger = logging.getLogger("asyncep")

_ANNOUNCE_SECONDS = 0.5
_REPORT_SECONDS = 1.0
# Products are sent as soon as so many bytes of them are there, while the rest is computed.
_PART_BYTES = 256 << 10
# The largest call: more tokens than any rank has in a batch.
_MOST_TOKENS = 1 << 16
# What may wait: beyond it calls are declined, and their callers fetch.
_MOST_WAITING_BYTES = 512 << 20
# Messages that are taken in before something is computed.
_MOST_AT_ONCE = 64


class LayerExperts(NamedTuple):
    """One layer of this host: where its experts are, which of them it has, and their shape."""

    table: ExpertTable
    held: frozenset[int]
    shape: Shape
    dtype: torch.dtype


class Payload(NamedTuple):
    """What came with a call: its hidden states and the order of its rows, where ZeroMQ has put them."""

    hidden: memoryview
    order: memoryview

    @property
    def nbytes(self) -> int:
        """Of both."""
        return len(self.hidden) + len(self.order)


@dataclass
class Served:
    """What a worker has done."""

    calls: int = 0
    rows: int = 0
    runs: int = 0
    declined: int = 0
    queue_seconds: float = 0.0
    busy_seconds: float = 0.0


class Worker:
    """Takes calls in and computes them, first come, first served.

    Args:
        socket: a ROUTER, bound.
        layers: what this host has.
        verify: compare what comes with its sender's digest.
        clock: seconds.
        between: called between the parts of a long computation.
        busy: answers the share of the host's cores that others use.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        layers: Mapping[int, LayerExperts],
        *,
        verify: bool,
        clock: Callable[[], float] = time.monotonic,
        between: Callable[[], None] = lambda: None,
        busy: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.served = Served()
        self.queue: CallQueue[Payload] = CallQueue()
        self._socket = socket
        self._layers = layers
        self._verify = verify
        self._clock = clock
        self._between = between
        self._busy = busy
        self._workspace = Workspace()

    def report(self) -> ServedReport:
        """For the launcher and whoever asks it."""
        return ServedReport(**vars(self.served), dropped=self.queue.dropped)

    def turn(self, seconds: float) -> None:
        """Waits for a call, at most so long, and computes the layer whose turn it is."""
        if not len(self.queue):
            self._socket.poll(int(seconds * 1000))
        self.admit()
        if batch := self.queue.take():
            self._compute(batch)

    def admit(self) -> None:
        """Takes in what has come, some at a time."""
        for _ in range(_MOST_AT_ONCE):
            try:
                caller, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._hear(caller.bytes, frames)

    def _hear(self, caller: bytes, frames: list[zmq.Frame]) -> None:
        try:
            call = decode_call(frames[0].bytes)
        except (msgspec.MsgspecError, IndexError):
            logger.warning("something that is no rank of this group speaks to the worker's port")
            return
        reason = self._fault(call, frames[1:])
        if reason is not None:
            logger.warning("a call for layer %d is declined: %s", call.layer, reason)
            self.served.declined += 1
            self._say(caller, Declined(call.number, reason))
            return
        hidden, order = frames[1:]
        self.queue.add(Waiting(caller, call, Payload(hidden.buffer, order.buffer), self._clock()))

    def _fault(self, call: Call, frames: list[zmq.Frame]) -> str | None:
        layer = self._layers.get(call.layer)
        if layer is None:
            return f"no experts of layer {call.layer} are here"
        if len(frames) != 2 or len(frames[1].buffer) % 4:
            return "it has other frames than hidden states and an order"
        hidden, order = (frame.buffer for frame in frames)
        # 0 is of a host that does not check.
        if self._verify and call.digest and fingerprint(hidden, order) != call.digest:
            return "it came otherwise than it was sent"
        if not len(order):
            return "it has no rows"
        if sum(entry.payload.nbytes for entry in self.queue) + len(hidden) > _MOST_WAITING_BYTES:
            return "too much waits here already"
        return fault(call, layer.shape, layer.held, len(hidden), np.frombuffer(order, dtype=np.int32))

    def _compute(self, batch: list[Waiting[Payload]]) -> None:
        began = self._clock()
        layer = self._layers[batch[0].call.layer]
        width = layer.shape.hidden
        merged = merge(
            [
                Rows(
                    entry.call.first,
                    entry.call.counts,
                    on(entry.payload.hidden, layer.dtype, (entry.call.tokens, width)),
                    on(entry.payload.order, torch.int32, (entry.rows,)),
                )
                for entry in batch
            ],
            layer.shape.experts,
        )
        dtype = cpu.results_dtype(merged.hidden, layer.table)
        rows = sum(entry.rows for entry in batch)
        results = self._workspace.take("worker.results", (rows, width), dtype)
        self.served.calls += len(batch)
        self.served.rows += rows
        self.served.runs += 1
        self.served.queue_seconds += sum(began - entry.since for entry in batch)
        for group in merged.groups(max(1, _PART_BYTES // (width * dtype.itemsize))):
            cpu.run(
                *(merged.hidden, merged.order, layer.table, results),
                first=group.start,
                last=group.stop,
                workspace=self._workspace,
            )
            for place, entry in enumerate(batch):
                part = merged.part(place, group.start, group.stop)
                if len(part):
                    self._answer(entry, part, merged.products(results, place, part))
            self._between()
        self.served.busy_seconds += self._clock() - began

    def _answer(self, entry: Waiting[Payload], part: range, products: torch.Tensor) -> None:
        frame = raw(products)
        digest = fingerprint(frame) if self._verify else 0
        answer = Answer(number=entry.call.number, row=part.start, rows=len(part), digest=digest, busy=self._busy())
        self._say(entry.caller, answer, frame)

    def _say(self, caller: bytes, message: ToCaller, *frames: memoryview) -> None:
        # To a caller that is gone ZeroMQ says nothing. The frame is copied: its memory is used again.
        self._socket.send_multipart([caller, encode(message), *frames])


def experts_of(export: Export) -> dict[int, LayerExperts]:
    """This host's experts by layer, read-only, as the launcher keeps them."""
    sides: dict[int, dict[str, torch.Tensor]] = {}
    held: dict[int, frozenset[int]] = {}
    for tensor in export.tensors:
        spec = tensor.spec
        memory = map_segment(tensor.segment.path, tensor.segment.nbytes, writable=False)
        sides.setdefault(spec.layer, {})[spec.name] = on(memory, getattr(torch, spec.dtype), spec.shape)
        held[spec.layer] = frozenset(tensor.experts)
    found = {}
    for layer, tensors in sides.items():
        w13, w2 = tensors["w13_weight"], tensors["w2_weight"]
        shape = Shape(len(w13), w2.shape[1], w2.element_size())
        found[layer] = LayerExperts(ExpertTable(w13, w2), held[layer], shape, w2.dtype)
    return found


def listen(group: GroupConfig, shapes: list[Shape]) -> tuple[zmq.Socket[bytes], str]:
    """The socket that ranks of other hosts speak to, and its address on the link."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.sndhwm = 0
    socket.maxmsgsize = max(shape.hidden * shape.item_bytes for shape in shapes) * _MOST_TOKENS
    socket.bind(f"tcp://{link_host(group)}:*")
    return socket, str(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def main() -> None:
    """Started by the launcher; runs until it is ended."""
    config, store = begin_side_process("worker")
    cpus = set().union(*config.cpus) or os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    torch.set_num_threads(len(cpus))
    # Answered when all ranks of this host have loaded.
    export = store.ask(ExportRequest(), Export, patience=None)
    layers = experts_of(export)
    try:
        socket, address = listen(config.group, [layer.shape for layer in layers.values()])
    except (OSError, zmq.ZMQError) as error:
        store.ask(Failed(-1, f"the worker cannot listen on the link: {error}"), Done, patience=1.0)
        raise SystemExit(1) from error
    line = _Announcer(config.group.exporter_address, address)
    worker = Worker(socket, layers, verify=config.group.verify == "every", between=line.speak, busy=Busy(cpus).share)
    told, on_its_way, report_at = worker.report(), False, 0.0
    while True:
        line.speak()
        worker.turn(_ANNOUNCE_SECONDS)
        # A launcher that stands still keeps nobody's rows waiting.
        on_its_way = on_its_way and store.poll(Done) is None
        if not on_its_way and time.monotonic() >= report_at and (report := worker.report()) != told:
            told, on_its_way, report_at = report, True, time.monotonic() + _REPORT_SECONDS
            store.post(report)


class _Announcer:
    """Tells this host's exporter, again and again, where the worker listens."""

    def __init__(self, exporter: str, address: str) -> None:
        self._line = zmq.Context().socket(zmq.DEALER)
        self._line.linger = 0
        # What an exporter that is away has not taken is not worth telling it later.
        self._line.sndhwm = 2
        self._line.connect(exporter)
        self._address = address
        self._spoke = 0.0

    def speak(self) -> None:
        """If it is time again."""
        if (now := time.monotonic()) < self._spoke + _ANNOUNCE_SECONDS:
            return
        self._spoke = now
        try:
            self._line.send(encode_peer(Works(self._address)), zmq.NOBLOCK)
        except zmq.Again:
            return


if __name__ == "__main__":
    try:
        main()
    except StoreError as error:
        raise SystemExit(f"asyncep: the worker ends: {error}") from error
