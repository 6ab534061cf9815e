"""A helper's side: threads of an idle rank that compute blocks of other ranks' offers (`help.c`)."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from ctypes import c_int32, c_uint32, c_void_p

from asyncep_kernels.help.board import Board, address_of
from asyncep_kernels.moe.cpu_native import addresses
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.native.library import needed


class Weights:
    """The experts of each layer as helpers find them.

    Args:
        tables: by decoder layer; bf16, each expert's matrix stored row after row.
    """

    def __init__(self, tables: Mapping[int, ExpertTable]) -> None:
        self.layers = max(tables, default=-1) + 1
        # Helpers have addresses alone: what lies there has to stay.
        self._kept = {layer: (addresses(table.w13), addresses(table.w2), table) for layer, table in tables.items()}
        self.w13, self.w2 = (c_void_p * self.layers)(), (c_void_p * self.layers)()
        for layer, (w13, w2, _) in self._kept.items():
            self.w13[layer], self.w2[layer] = w13.data_ptr(), w2.data_ptr()


class Visits:
    """What one helping thread has mapped of the others' offers.

    Args:
        board: of this rank.
        weights: of all layers.
    """

    def __init__(self, board: Board, weights: Weights) -> None:
        self._board, self._weights = board, weights
        self._offers, self._generations = (c_void_p * board.ranks)(), (c_uint32 * board.ranks)()
        self._mapped: dict[int, mmap.mmap] = {}

    def help(self, stop: c_int32) -> int:
        """Helps until ``stop`` is not 0 and the board rings.

        Returns:
            A rank whose memory has to be mapped first, see `map`; -1 at the end.
        """
        board, weights = self._board, self._weights
        return int(
            needed().asyncep_help_others(
                *(board.address, board.rank, board.ranks, self._offers, self._generations),
                *(weights.w13, weights.w2, weights.layers, ctypes.addressof(stop)),
            )
        )

    def map(self, rank: int, generation: int, memory: mmap.mmap | None) -> None:
        """A rank's memory of that generation is this; None if it cannot be mapped."""
        self._offers[rank] = None if memory is None else address_of(memory)
        self._generations[rank] = generation
        before = self._mapped.pop(rank, None)
        if before is not None:
            before.close()
        if memory is not None:
            self._mapped[rank] = memory


def ring(board: Board) -> None:
    """Wakes every helper that sleeps."""
    needed().asyncep_help_ring(board.address)
