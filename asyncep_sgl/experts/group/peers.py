"""What hosts of a group say to each other, and a host's exporter to its own ranks. No transport in here."""

from __future__ import annotations

import msgspec

from asyncep_router.frames import decoded


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A host as the others have to know it.

    Attributes:
        node: its place in the group, from 0.
        incarnation: grows with each start of its exporter (nanoseconds since the epoch); what was known of an earlier
            one is void.
        address: ``tcp://host:port`` where its exporter listens.
        launcher: names the start of the server that the exporter belongs to.
        nodes, ranks, copies, resident_layers, resident_experts: how it divides the experts; has to be the same
            everywhere.
        model: fingerprint of its checkpoint.
        version: of this package.
        strategy: how its experts and tokens come together.
        isa: instructions that its kernels use, where rows travel and so have to have the same bits everywhere; else
            empty.
        ready: its experts are in memory and may be read.
        calls: ``tcp://host:port`` where its worker takes calls; empty while it has none.
    """

    node: int
    incarnation: int
    address: str
    launcher: str
    nodes: int
    ranks: int
    copies: int
    resident_layers: int
    resident_experts: int
    model: str
    version: str
    strategy: str = "asyncep"
    isa: str = ""
    ready: bool = False
    calls: str = ""


class Announce(msgspec.Struct, tag=True, frozen=True):
    """A host introduces itself, again and again; that it does is the sign that it lives."""

    card: Card


class Cards(msgspec.Struct, tag=True, frozen=True):
    """Answer to `Announce`: everybody the answering host knows, itself first."""

    cards: tuple[Card, ...]


class NotAdmitted(msgspec.Struct, tag=True, frozen=True):
    """The host cannot be in this group; ``reason`` names flag and fix."""

    reason: str


class Describe(msgspec.Struct, tag=True, frozen=True):
    """Asks a host for its `Descriptor`."""


class TensorAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a host's experts of one tensor lie in its exporter's memory.

    Expert e is at ``address + e * stride`` and has ``stride`` bytes, if e is among ``experts``.
    """

    layer: int
    name: str
    address: int
    stride: int
    experts: tuple[int, ...]
    digests: tuple[int, ...]


class Descriptor(msgspec.Struct, tag=True, frozen=True):
    """All a reader needs: ``agent`` is the transport's own description of the exporter."""

    node: int
    incarnation: int
    agent: bytes
    tensors: tuple[TensorAddress, ...]


class Works(msgspec.Struct, tag=True, frozen=True):
    """A host's worker tells its own exporter where it takes calls, again and again."""

    address: str


class ViewRequest(msgspec.Struct, tag=True, frozen=True):
    """A rank (or the front) asks its host's exporter for `View`."""


class NodeView(msgspec.Struct, frozen=True):
    """One other host; ``descriptor`` is its last known, kept when the host goes away. ``calls``: as in its `Card`."""

    node: int
    address: str
    alive: bool
    descriptor: Descriptor | None
    calls: str = ""


class View(msgspec.Struct, tag=True, frozen=True):
    """The other hosts, and which ``absent`` ones nobody has heard of yet."""

    nodes: tuple[NodeView, ...]
    absent: tuple[int, ...]


class HealthRequest(msgspec.Struct, tag=True, frozen=True):
    """`ViewRequest` without the descriptors: for those who only want to know who is there."""


Message = Announce | Cards | NotAdmitted | Describe | Descriptor | Works | ViewRequest | View | HealthRequest

_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """One frame."""
    return msgspec.msgpack.encode(message)


def decode(frame: bytes) -> Message:
    """The message of a frame. Raises `msgspec.MsgspecError`."""
    message: Message = decoded(_decoder, frame)
    return message
