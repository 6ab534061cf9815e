"""Large reads cut into slices and dealt round over the peers, so that no peer's link serves everyone at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asyncep_sgl.experts.gather.plan import Piece

SLICE_BYTES = 1 << 20


class Slice(NamedTuple):
    """``nbytes`` of one tensor: from byte ``source`` of the peer's piece of it, to byte ``target`` of the slot."""

    node: int
    name: str
    expert: int
    """The first of the piece; ``source`` counts from it."""
    source: int
    target: int
    nbytes: int


def slices(pieces: Sequence[Piece], reader: int, nodes: int, largest: int = SLICE_BYTES) -> list[Slice]:
    """Every byte of ``pieces`` once, at most ``largest`` at a time, one slice a peer in turn from the reader's next on.

    Raises:
        ValueError: ``largest`` is not positive.
    """
    if largest < 1:
        raise ValueError(f"slices of {largest} bytes")
    queues: dict[int, list[Slice]] = {}
    for piece in pieces:
        for start in range(0, piece.nbytes, largest):
            nbytes = min(largest, piece.nbytes - start)
            queues.setdefault(piece.node, []).append(
                Slice(piece.node, piece.name, piece.experts.start, start, piece.offset + start, nbytes)
            )
    order = sorted(queues, key=lambda node: (node - reader - 1) % nodes)
    rounds = max((len(queue) for queue in queues.values()), default=0)
    return [queues[node][turn] for turn in range(rounds) for node in order if turn < len(queues[node])]
