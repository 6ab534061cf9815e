"""What a rank offers: a layer's sorted rows, or its attention, in memory that helpers map (`help.c`).

The rank computes block after block; so does whoever comes. What a block gives does not depend on who computes it. For
what the C kernels of `moe.cpu_native` and `attention.cpu_native` serve.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import time
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64
from typing import NamedTuple

import torch

from asyncep_kernels.attention.cpu_native import NativePlan
from asyncep_kernels.help.board import LINE, Board, address_of
from asyncep_kernels.moe.cpu_native import addresses
from asyncep_kernels.moe.stages import Sorted
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.native.library import needed, on_threads

# Who computed a block.
OWNER, HELPER = 1, 2
# How long a helper that has begun a block is waited for: so many times what this rank took for its own, or so long.
PATIENCE = 4.0
LEAST_PATIENCE = 0.05
# What is offered.
_EXPERTS, _ATTENTION = 0, 1


class _Header(ctypes.Structure):
    """``struct offer`` of help.c."""

    _fields_ = (
        ("open", c_int32),
        ("inside", c_int32),
        *((name, c_int64) for name in ("next", "blocks", "done", "kind")),
        *((name, c_int64) for name in ("layer", "hidden", "inter", "first", "experts")),
        *((name, c_int64) for name in ("starts", "tokens", "states", "results")),
        *((name, c_int64) for name in ("heads", "kv_heads", "dim", "v_dim", "window", "groups")),
        *((name, c_int64) for name in ("q", "k", "v", "out")),
        *((name, c_int64) for name in ("members", "shared", "query", "new_tokens", "prefix", "slot_start", "slots")),
        ("scale", c_double),
    )


class Done(NamedTuple):
    """How something offered was computed.

    Attributes:
        blocks: of it.
        helped: computed by others.
        left: whether a helper did not come out in time: the memory is not to be used again.
    """

    blocks: int
    helped: int
    left: bool


class Offer:
    """One rank's memory for what it offers.

    Args:
        board: of the rank.
        memory: enough of it, see `expert_bytes` and `attention_bytes`; mapped by helpers too.
    """

    def __init__(self, board: Board, memory: mmap.mmap) -> None:
        self._board = board
        self._memory = memory
        self._header = _Header.from_buffer(memory)
        self._address = address_of(memory)

    def write_rows(self, layer: int, hidden: torch.Tensor, order: Sorted, experts: ExpertTable) -> torch.Tensor:
        """Rows of a layer, of which `compute_rows` then offers some.

        Args:
            layer: which; helpers find its weights by it.
            hidden: ``(T, H)`` bf16.
            order: where its tokens go.
            experts: of the layer.

        Returns:
            ``(T * K, H)`` bf16 for the results, in the memory.
        """
        header, width = self._header, hidden.shape[1]
        header.kind, header.layer, header.hidden, header.inter = _EXPERTS, layer, width, experts.w2[0].shape[1]
        end = self._write(starts=order.starts, tokens=order.tokens, states=hidden)
        rows = order.tokens.numel()
        header.results, header.done = end, end + _lines(2 * rows * width)
        return self._tensor(end, (rows, width), torch.bfloat16)

    def compute_rows(self, order: Sorted, experts: ExpertTable, first: int, last: int) -> Done:
        """Computes the rows of experts ``first`` up to ``last`` of what was written, with whoever helps.

        Args:
            order, experts: as written.

        Raises:
            MemoryError: no scratch memory.
        """
        self._header.first, self._header.experts = first, last - first
        blocks = needed().asyncep_moe_blocks(order.starts[first:].data_ptr(), last - first)
        w13, w2 = addresses(experts.w13), addresses(experts.w2)
        return self._compute(blocks, w13.data_ptr(), w2.data_ptr())

    def attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plan: NativePlan,
        *,
        scale: float,
        window: int | None,
        out: torch.Tensor,
    ) -> Done:
        """`asyncep_kernels.attention.cpu_native.attention`, with whoever helps.

        Args:
            q: ``(T, Hq, D)`` bf16.
            k_cache, v_cache: ``(slots, Hkv, D)`` and ``(slots, Hkv, Dv)`` bf16.
            plan, scale, window: as there.
            out: ``(T, Hq, Dv)`` bf16, written.

        Raises:
            MemoryError: no scratch memory.
        """
        header = self._header
        header.kind, header.window, header.scale = (
            _ATTENTION,
            -1 if window is None else window,
            scale * math.log2(math.e),
        )
        (header.heads, header.dim), (header.kv_heads, header.v_dim) = q.shape[1:], v_cache.shape[1:]
        header.groups = plan.batch.groups
        # The cache is the rank's own: its rows travel, in the order of the batch.
        *lengths, slots = plan.tensors
        names = ("members", "shared", "query", "new_tokens", "prefix", "slot_start")
        end = self._write(**dict(zip(names, lengths, strict=True)), slots=torch.arange(len(slots)), q=q)
        for name, cache in (("k", k_cache), ("v", v_cache)):
            setattr(header, name, end)
            rows = self._tensor(end, (len(slots), *cache.shape[1:]), cache.dtype)
            torch.index_select(cache, 0, slots, out=rows)
            end += _lines(2 * rows.numel())
        header.out, header.done = end, end + _lines(2 * out.numel())
        blocks = needed().asyncep_attention_blocks(ctypes.byref(plan.batch), header.heads, header.kv_heads)
        done = self._compute(blocks, None, None)
        out.copy_(self._tensor(header.out, out.shape, out.dtype))
        return done

    def _compute(self, blocks: int, w13: int | None, w2: int | None) -> Done:
        if not blocks:
            return Done(0, 0, left=False)
        kernels, header, board = needed(), self._header, self._board
        header.blocks = blocks
        done = self._tensor(header.done, (blocks,), torch.uint8).zero_()

        def compute(begun: c_int64 | None) -> int:
            counter = None if begun is None else ctypes.addressof(begun)
            return int(kernels.asyncep_help_compute(self._address, w13, w2, counter, OWNER, None))

        since = time.monotonic()
        kernels.asyncep_help_open(board.address, board.rank, self._address)
        try:
            on_threads(lambda: compute(None))
        finally:
            patience = max(LEAST_PATIENCE, PATIENCE * (time.monotonic() - since))
            left = kernels.asyncep_help_close(board.address, board.rank, self._address, int(patience * 1e9))
        if not bool(done.all()):
            # Begun by a helper that is gone, or had no memory. The common counter is not set back: a helper that is
            # still inside would take blocks from it.
            begun = c_int64(0)
            on_threads(lambda: compute(begun))
        return Done(blocks, int((done == HELPER).sum()), left=bool(left))

    def _write(self, **tensors: torch.Tensor) -> int:
        """Each to its place, which the header says; where the last one ends."""
        at = mmap.PAGESIZE
        for name, tensor in tensors.items():
            setattr(self._header, name, at)
            if tensor.numel():
                self._tensor(at, tensor.shape, tensor.dtype).copy_(tensor)
            at += _lines(tensor.numel() * tensor.element_size())
        return at

    def _tensor(self, at: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at).view(tuple(shape))


def expert_bytes(tokens: int, k: int, experts: int, width: int) -> int:
    """Memory for an offer of so many tokens' rows at most.

    Args:
        tokens: T.
        k: experts of a token.
        experts: of a layer, E.
        width: H.
    """
    rows = tokens * k
    parts = (8 * (experts + 1), 4 * rows, 2 * tokens * width, 2 * rows * width, rows)
    return mmap.PAGESIZE + sum(_lines(part) for part in parts)


def attention_bytes(q: torch.Tensor, v_cache: torch.Tensor, plan: NativePlan) -> int:
    """Memory for an offer of this attention."""
    tokens, heads, dim = q.shape
    kv_heads, v_dim = v_cache.shape[1:]
    keys, sequences = len(plan.tensors[-1]), len(plan.tensors[2])
    parts = (
        *(8 * (sequences + 1) for _ in range(6)),
        8 * keys,
        *(2 * keys * kv_heads * each for each in (dim, v_dim)),
        *(2 * tokens * heads * each for each in (dim, v_dim)),
        kv_heads * (tokens + sequences),
    )
    return mmap.PAGESIZE + sum(_lines(part) for part in parts)


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE
