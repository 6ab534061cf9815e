"""The page where the ranks of a host say whether they are idle and where their offers lie (`help.c`)."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import c_int32, c_uint32
from typing import NamedTuple

# Bytes that two processes write to without slowing each other.
LINE = 64


class _Place(ctypes.Structure):
    """``struct place`` of help.c."""

    _fields_ = (
        ("idle", c_int32),
        ("offered", c_int32),
        ("pid", c_int32),
        ("descriptor", c_int32),
        ("generation", c_uint32),
        ("rest", c_int32 * 11),
    )


class OfferPlace(NamedTuple):
    """Where a rank's offers lie: descriptor ``descriptor`` of process ``pid``, the rank's n-th."""

    pid: int
    descriptor: int
    generation: int


def board_bytes(ranks: int) -> int:
    """What the page of so many ranks takes."""
    return -(-LINE * (1 + ranks) // mmap.PAGESIZE) * mmap.PAGESIZE


class Board:
    """The page where ranks say whether they are idle, and ring when they offer a layer.

    Args:
        memory: `board_bytes` of it, zero at first, mapped by every rank.
        ranks: that share it.
        rank: this one.
    """

    def __init__(self, memory: mmap.mmap, ranks: int, rank: int) -> None:
        self.ranks = ranks
        self.rank = rank
        self.address = address_of(memory)
        self._places = (_Place * ranks).from_buffer(memory, LINE)

    @property
    def idle(self) -> bool:
        """Whether this rank computes no batch; its helpers begin no block unless it is."""
        return bool(self._places[self.rank].idle)

    @idle.setter
    def idle(self, value: bool) -> None:
        self._places[self.rank].idle = value

    def others_idle(self) -> bool:
        """Whether another rank could help."""
        return any(place.idle for rank, place in enumerate(self._places) if rank != self.rank)

    def offer_place(self, rank: int) -> OfferPlace:
        """Where a rank's offers lie; generation 0 if it has made none."""
        place = self._places[rank]
        return OfferPlace(place.pid, place.descriptor, place.generation)

    def leave(self) -> None:
        """This rank neither helps nor offers anything; one that died may have left that open."""
        place = self._places[self.rank]
        place.offered = 0
        place.idle = 0

    def publish(self, pid: int, descriptor: int) -> None:
        """This rank's offers lie in another memory from now on."""
        place = self._places[self.rank]
        place.offered = 0
        place.pid, place.descriptor = pid, descriptor
        place.generation = place.generation % (2**32 - 1) + 1


def address_of(memory: mmap.mmap) -> int:
    """Where it lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
