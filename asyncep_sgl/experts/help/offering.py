"""A rank's side of help: it offers its layers' experts and attention to the idle ranks of its host."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from asyncep_kernels.attention import cpu_native as attention_native
from asyncep_kernels.attention.plan import Plan
from asyncep_kernels.help.board import Board, board_bytes
from asyncep_kernels.help.offer import Done, Offer, attention_bytes, expert_bytes
from asyncep_kernels.moe import cpu
from asyncep_kernels.moe import cpu_native as moe_native
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.experts.help.helper import SEGMENT
from asyncep_sgl.process.segment import OwnedSegment, map_segment

logger = logging.getLogger("asyncep")

# Extent of a rank's memory for offers; pages come as they are written to. Larger batches' rows are offered in pieces,
# larger attention not at all.
MOST_BYTES = 256 << 20
# Tokens of a piece.
PIECE_TOKENS = 4096
# What takes less than this, some 0.1 ms on one core, is not worth a ring. Of experts: FLOPs, or bytes of weights.
LEAST_FLOPS = 20e6
LEAST_BYTES = 1 << 20
# Of attention: products of a query and a key, over all heads.
LEAST_PRODUCTS = 200_000
# Attention's keys and values are copied first: a byte takes as long as some ten FLOPs, and has to be worth it.
LEAST_FLOPS_A_BYTE = 40


@dataclass
class HelpCounts:
    """So far.

    Attributes:
        blocks: that were offered, whoever computed them.
        helped: of these, computed by other ranks.
        left: offers whose helper did not come out in time; the rank computed its blocks.
    """

    blocks: int = 0
    helped: int = 0
    left: int = 0


def join_board(path: str, ranks: int, rank: int) -> Board:
    """This rank's view of the launcher's page; it is not idle yet.

    Raises:
        OSError: the launcher is gone.
    """
    board = Board(map_segment(path, board_bytes(ranks), writable=True), ranks, rank)
    board.leave()
    return board


class Offering:
    """For the one thread that computes.

    Args:
        board: of this rank.
    """

    def __init__(self, board: Board) -> None:
        self.board = board
        self.counts = HelpCounts()
        self._workspace = Workspace()
        self._segment: OwnedSegment | None = None
        self._offer: Offer | None = None
        self._refused = False

    def moe(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: ExpertTable
    ) -> torch.Tensor | None:
        """`asyncep_kernels.moe.cpu.moe`, bit for bit, with whoever helps; None where nobody could.

        Args:
            layer: which, for helpers.
            hidden: ``(T, H)``.
            ids, weights: ``(T, K)``, where its tokens go.
            experts: of the layer.

        Raises:
            MemoryError: no scratch memory.
        """
        if not self.board.others_idle():
            return None
        rows, each = ids.numel(), experts.w13[0].numel() + experts.w2[0].numel()
        if 2 * rows * each < LEAST_FLOPS and 2 * min(rows, len(experts.w13)) * each < LEAST_BYTES:
            return None
        if not moe_native.serves(hidden, experts) or (offer := self._memory()) is None:
            return None
        tokens = PIECE_TOKENS
        while expert_bytes(tokens, ids.shape[1], len(experts.w13), hidden.shape[1]) > MOST_BYTES:
            tokens //= 2
        out = torch.empty_like(hidden)
        for at in range(0, len(hidden), tokens):
            piece = slice(at, at + tokens)
            order = cpu.sort(ids[piece], len(experts.w13), workspace=self._workspace)
            results = offer.write_rows(layer, hidden[piece], order, experts)
            done = offer.compute_rows(order, experts, 0, len(experts.w13))
            cpu.combine(results, order.place, weights[piece], out=out[piece])
            self._count(done)
            if (offer := self._memory()) is None:
                # The one before is spent, and there is no memory for another.
                rest = slice(at + tokens, None)
                out[rest] = cpu.moe(hidden[rest], ids[rest], weights[rest], experts)
                break
        return out

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: Plan,
        *,
        scale: float,
        out: torch.Tensor,
    ) -> bool:
        """`asyncep_kernels.attention.cpu.attention`, bit for bit, with whoever helps.

        Args:
            q: ``(T, Hq, D)``.
            k_cache, v_cache: ``(slots, Hkv, D)`` and ``(slots, Hkv, Dv)``.
            plan, scale: as there.
            out: ``(T, Hq, Dv)``, written.

        Returns:
            False where nobody could; nothing is written then.

        Raises:
            MemoryError: no scratch memory.
        """
        if not self.board.others_idle():
            return False
        products = q.shape[1] * sum(n * (p + n / 2) for n, p in zip(plan.batch.new, plan.batch.prefix, strict=True))
        if products < LEAST_PRODUCTS or not attention_native.serves(q, k_cache, v_cache, out):
            return False
        keys = sum(n + p for n, p in zip(plan.batch.new, plan.batch.prefix, strict=True))
        copied = 2 * keys * k_cache.shape[1] * (k_cache.shape[2] + v_cache.shape[2])
        if 4 * products * q.shape[2] < LEAST_FLOPS_A_BYTE * copied:
            return False
        if attention_bytes(q, v_cache, plan.native) > MOST_BYTES or (offer := self._memory()) is None:
            return False
        done = offer.attention(q, k_cache, v_cache, plan.native, scale=scale, window=plan.window, out=out)
        self._count(done)
        return True

    def _memory(self) -> Offer | None:
        """The rank's offer; None once there has been no memory for one."""
        if self._offer is None and not self._refused:
            try:
                self._segment = OwnedSegment(f"{SEGMENT}-{self.board.rank}", MOST_BYTES, spans=())
                self._offer = Offer(self.board, map_segment(self._segment.path, MOST_BYTES, writable=True))
            except OSError as error:
                self._refused = True
                if self._segment is not None:
                    self._segment.close()
                    self._segment = None
                logger.warning("rank %d has no memory for offers and computes alone: %s", self.board.rank, error)
                return None
            self.board.publish(os.getpid(), self._segment.descriptor)
        return self._offer

    def _count(self, done: Done) -> None:
        self.counts.blocks += done.blocks
        self.counts.helped += done.helped
        if done.left and self._segment is not None:
            # Whoever is still in the memory may stay there: it is not used again.
            self.counts.left += 1
            self._segment.close()
            self._segment = self._offer = None
