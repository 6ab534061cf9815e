"""An idle rank's side of help: threads that compute blocks of what other ranks offer."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from ctypes import c_int32

import torch

from asyncep_kernels.help.board import Board
from asyncep_kernels.help.visits import Visits, Weights, ring
from asyncep_sgl.process.segment import map_segment, segment_path

# Of the memory of a rank's offers, with the rank's number behind it.
SEGMENT = "help"


class Helper:
    """Threads, as many as the rank computes with, that sleep until another rank offers a layer while this one is idle.

    Args:
        board: of this rank.
        weights: of all layers that may be offered.
    """

    def __init__(self, board: Board, weights: Weights) -> None:
        self._board = board
        self._stop = c_int32(0)
        self._threads = [
            threading.Thread(target=self._serve, args=(Visits(board, weights),), name="asyncep-help", daemon=True)
            for _ in range(torch.get_num_threads())
        ]

    def start(self) -> None:
        """From now on other ranks count on this one while it is idle."""
        for thread in self._threads:
            thread.start()
        self._board.idle = True

    def close(self) -> None:
        """Leaves what it helps with after the block that it computes."""
        self._board.idle = False
        self._stop.value = 1
        ring(self._board)
        for thread in self._threads:
            thread.join()

    def _serve(self, visits: Visits) -> None:
        while (rank := visits.help(self._stop)) >= 0:
            place = self._board.offer_place(rank)
            memory = None
            # The rank may be gone, and another come in its place: then it has another generation.
            with contextlib.suppress(OSError, ValueError):
                memory = _mapped(segment_path(place.pid, place.descriptor), rank)
            if self._board.offer_place(rank) == place:
                visits.map(rank, place.generation, memory)


def _mapped(path: str, rank: int) -> mmap.mmap | None:
    """A rank's offers; None if another process has the number of one that is gone."""
    if not os.readlink(path).startswith(f"/memfd:asyncep-{SEGMENT}-{rank} "):
        return None
    return map_segment(path, os.stat(path).st_size, writable=True)
