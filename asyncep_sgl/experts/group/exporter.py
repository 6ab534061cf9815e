"""The process through which other hosts read this host's experts, and that knows which hosts there are.

It stands beside the ranks: a rank that dies, stops or computes has no part in what others read. It reads nothing
itself and holds no expert of its own: the launcher's memory is mapped, so its restart costs no more than a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import zmq

from asyncep_kernels.native import isa
from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.group.link import link_host
from asyncep_sgl.experts.group.membership import Membership
from asyncep_sgl.experts.group.nixl_agent import make_agent
from asyncep_sgl.experts.group.peers import (
    Announce,
    Card,
    Cards,
    Describe,
    Descriptor,
    HealthRequest,
    Message,
    NodeView,
    NotAdmitted,
    TensorAddress,
    View,
    ViewRequest,
    Works,
    decode,
    encode,
)
from asyncep_sgl.experts.store.client import StoreClient, begin_side_process
from asyncep_sgl.experts.store.messages import Done, Export, ExportRequest, Failed
from asyncep_sgl.process.segment import map_segment
from asyncep_sgl.process.zmq_end import for_own_user

logger = logging.getLogger("asyncep")

ANNOUNCE_SECONDS = 0.5
PATIENCE_SECONDS = 3.0


@dataclass
class Exporter:
    """Speaks with the group's other exporters and this host's ranks.

    Attributes:
        group: the configuration.
        membership: who is known.
        on_refusal: called with the reason when another host does not admit this one.
    """

    group: GroupConfig
    membership: Membership
    on_refusal: Callable[[str], None]
    _context: Any = field(default_factory=zmq.Context)
    _poller: zmq.Poller = field(default_factory=zmq.Poller)
    _lines: dict[str, Any] = field(default_factory=dict)
    _descriptors: dict[int, Descriptor] = field(default_factory=dict)
    _own: Descriptor | None = None
    _waiting_since: float = field(default_factory=time.monotonic)
    _worker_spoke: float = 0.0
    _spoke: float = 0.0

    def __post_init__(self) -> None:
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._poller.register(self._socket, zmq.POLLIN)

    def listen(self) -> str:
        """Opens both doors: to the other hosts and to this host's ranks. Returns the address the others use.

        Raises:
            StoreError: the address cannot be had.
        """
        try:
            if self.group.node == 0:
                address = f"tcp://{self.group.rendezvous}"
                self._socket.bind(address)
            else:
                self._socket.bind(f"tcp://{link_host(self.group)}:*")
                address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        except (OSError, zmq.ZMQError) as error:
            raise StoreError(
                f"--dist-init-addr {self.group.rendezvous}: node {self.group.node} cannot listen there ({error}); "
                "give an address of node 0 that every host can reach"
            ) from error
        for_own_user(self._socket)
        self._socket.bind(self.group.exporter_address)
        return address

    def export(self, own: Descriptor) -> None:
        """This host's experts may be read from now on."""
        self._own = own
        card = self.membership.own
        self.membership.own = msgspec.structs.replace(card, ready=True)

    def turn(self, sleep: float) -> None:
        """Hears and answers for at most ``sleep`` seconds, introduces itself where that is due."""
        now = time.monotonic()
        if self.membership.own.calls and now - self._worker_spoke > PATIENCE_SECONDS:
            self._worker("")
        if now - self._spoke >= ANNOUNCE_SECONDS:
            self._spoke = now
            self._introduce()
            self._mention_absent(now)
        for ready, _ in self._poller.poll(int(sleep * 1000)):
            while True:
                try:
                    frames = ready.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                self._hear(ready, frames)

    def _introduce(self) -> None:
        addresses = {card.address for card in self.membership.cards()[1:]}
        if self.group.node != 0:
            addresses.add(f"tcp://{self.group.rendezvous}")
        for gone in set(self._lines) - addresses:
            self._poller.unregister(self._lines[gone])
            self._lines.pop(gone).close()
        for address in addresses:
            if address not in self._lines:
                line = self._context.socket(zmq.DEALER)
                line.linger = 0
                # What a host that is away has not taken is not worth telling it later.
                line.sndhwm = 4
                line.connect(address)
                self._poller.register(line, zmq.POLLIN)
                self._lines[address] = line
            self._say(self._lines[address], Announce(self.membership.own))
            card = next((c for c in self.membership.cards()[1:] if c.address == address), None)
            if card is not None and card.ready and not self._described(card):
                self._say(self._lines[address], Describe())

    def _described(self, card: Card) -> bool:
        known = self._descriptors.get(card.node)
        return known is not None and known.incarnation == card.incarnation

    def _hear(self, ready: Any, frames: list[bytes]) -> None:
        try:
            message = decode(frames[-1])
        except msgspec.MsgspecError:
            logger.warning("something that is no host of this group speaks to its port")
            return
        now = time.monotonic()
        match message:
            case Announce(card):
                reason = self.membership.admit(card, now)
                if reason is not None:
                    logger.error("node %d is not admitted: %s", card.node, reason)
                    self._say(ready, NotAdmitted(reason), frames[:-1])
                else:
                    self._say(ready, Cards(self.membership.cards()), frames[:-1])
            case Cards(cards):
                self.membership.learn(cards, now)
            case NotAdmitted(reason):
                self.on_refusal(reason)
            case Describe():
                if self._own is not None:
                    self._say(ready, self._own, frames[:-1])
            case Descriptor():
                self._descriptors[message.node] = message
            case Works(address):
                self._worker_spoke = now
                if address != self.membership.own.calls:
                    self._worker(address)
            case ViewRequest():
                self._say(ready, self._view(now, with_descriptors=True), frames[:-1])
            case HealthRequest():
                self._say(ready, self._view(now, with_descriptors=False), frames[:-1])
            case View():
                logger.warning("a host answered what nobody asked")

    def _view(self, now: float, *, with_descriptors: bool) -> View:
        nodes = []
        for card in self.membership.cards()[1:]:
            known = self._descriptors.get(card.node)
            current = known is not None and known.incarnation == card.incarnation
            alive = self.membership.alive(card.node, now) and current
            descriptor = known if with_descriptors else None
            nodes.append(NodeView(card.node, card.address, alive, descriptor, card.calls if alive else ""))
        return View(tuple(nodes), self.membership.absent())

    def _worker(self, address: str) -> None:
        """This host's worker has come, or has been silent for too long."""
        self.membership.own = msgspec.structs.replace(self.membership.own, calls=address)

    def _say(self, line: Any, message: Message, envelope: list[bytes] | None = None) -> None:
        try:
            line.send_multipart([*(envelope or ()), encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            # It is away; the next introduction tells it all again.
            return

    def _mention_absent(self, now: float) -> None:
        absent = self.membership.absent()
        if not absent:
            self._waiting_since = now
        elif now - self._waiting_since >= 10:
            self._waiting_since = now
            logger.info(
                "node %d waits for node(s) %s of --nnodes %d (--dist-init-addr %s)",
                self.group.node,
                ", ".join(map(str, absent)),
                self.group.nodes,
                self.group.rendezvous,
            )


def describe(group: GroupConfig, incarnation: int, export: Export) -> tuple[Descriptor, Any]:
    """Maps the host's experts and makes them readable; the second value has to be kept for as long as they are."""
    agent = make_agent(f"asyncep-exporter-{group.node}-{incarnation}")
    memory, regions, addresses = [], [], []
    for tensor in export.tensors:
        mapped = map_segment(tensor.segment.path, tensor.segment.nbytes, writable=False)
        # numpy tells a read-only mapping's address; ctypes refuses one.
        address = int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
        memory.append(mapped)
        regions.append((address, tensor.segment.nbytes, 0, ""))
        spec = tensor.spec
        addresses.append(
            TensorAddress(spec.layer, spec.name, address, spec.nbytes // spec.shape[0], tensor.experts, tensor.digests)
        )
    agent.register_memory(regions, "DRAM")
    own = Descriptor(group.node, incarnation, agent.get_agent_metadata(), tuple(addresses))
    return own, (agent, memory)


def main() -> None:
    """Started by the launcher; runs until it is ended."""
    config, store = begin_side_process("exporter")

    def fail(reason: str) -> None:
        store_line = StoreClient(config.store_address)
        store_line.ask(Failed(-1, reason), Done, patience=1.0)
        raise SystemExit(1)

    group, incarnation = config.group, time.time_ns()
    card = Card(
        node=group.node,
        incarnation=incarnation,
        address="",
        launcher=config.store_address,
        nodes=group.nodes,
        ranks=config.ranks,
        copies=group.copies,
        resident_layers=group.resident_layers,
        resident_experts=group.resident_experts,
        model=group.model,
        version=config.version,
        strategy=config.strategy,
        isa="" if config.strategy == "asyncep" else isa.choose().value,
    )
    exporter = Exporter(group, Membership(card, PATIENCE_SECONDS), fail)
    try:
        address = exporter.listen()
    except StoreError as error:
        fail(str(error))
        return
    exporter.membership.own = msgspec.structs.replace(card, address=address)
    # The store answers when all ranks of this host have loaded; meanwhile hosts get to know each other.
    store.post(ExportRequest())
    kept = None
    while True:
        exporter.turn(0.1)
        if kept is None:
            export = store.poll(Export)
            if export is not None:
                own, kept = describe(group, incarnation, export)
                exporter.export(own)


if __name__ == "__main__":
    main()
