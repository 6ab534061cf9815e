"""``moe`` on GPUs: grouped GEMMs over a table of expert addresses.

An expert is read where it lies, through its address; local shards and gather slots are never copied together. Nothing
is read back to the host. Reads are plain (``cp.async``), not TMA: descriptors would have to be made for every slot,
TMA cannot gather rows by token, and its reads are not ordered by the acquire that the wait for an expert ends with.

The down projection writes one row per assignment and `unpermute` sums a token's rows in fp32. Adding into the
token's row with atomics would save that pass and give sums whose order, so last bits, differ from run to run, in
fp32 (twice the bytes) with K writers contending for every row. Weighing happens in the sum, in fp32, unrounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from asyncep_kernels.moe.configs import SMALL, MoeConfig, Scheme, Tile, choose
from asyncep_kernels.moe.pointers import PointerTable, pointer_table
from asyncep_kernels.moe.quant import BLOCK, Format
from asyncep_kernels.moe.ready import Ready
from asyncep_kernels.moe.table import ExpertTable, check, check_routing
from asyncep_kernels.permute.layout import Permutation
from asyncep_kernels.permute.triton import permute, unpermute
from asyncep_kernels.quantize.triton import quantize
from asyncep_kernels.triton_support import (
    FP8_LARGEST,
    INTERPRETED,
    SMALLEST,
    e4m3_to_bf16,
    launch,
    multiply,
    round_to,
)
from asyncep_kernels.workspace import Workspace

# How weights' scales lie: none, one a 128 x 128 block, one a row.
NO_SCALES, BLOCK_SCALES, ROW_SCALES = 0, 1, 2


@triton.jit
def await_flag(flags, flag_of, expert, epoch, limit):
    """Whether the expert's flag reached ``epoch`` within ``limit`` looks.

    The looks are volatile loads, which contend for nothing. The last one is an acquire for the whole system, behind
    which no read of the weights may move.
    """
    flag = tl.load(flag_of + expert)
    seen = epoch
    if flag >= 0:
        looks = 0
        seen = tl.load(flags + flag, volatile=True)
        while (seen < epoch) & (looks < limit):
            seen = tl.load(flags + flag, volatile=True)
            looks += 1
        seen = tl.atomic_add(flags + flag, 0, sem="acquire", scope="sys")
        tl.debug_barrier()
    return seen >= epoch


@triton.jit
def load_weights(where, mask, MASKED: tl.constexpr, WIDEN: tl.constexpr, INTERPRETED: tl.constexpr):
    """A tile of weights; as bf16 where they are stored narrower than what they are multiplied with."""
    if MASKED:
        found = tl.load(where, mask=mask, other=0.0)
    else:
        found = tl.load(where)
    if WIDEN:
        if found.dtype == tl.uint8:
            found = e4m3_to_bf16(found, INTERPRETED)
        else:
            found = round_to(found.to(tl.float32), tl.bfloat16, INTERPRETED)
    return found


# What differs from batch to batch must not be specialised on: that would compile while requests wait.
@triton.jit(do_not_specialize=["epoch", "limit", "blocks", "assignments"])
def expert_gemm_kernel(
    x,
    x_scale,
    rows,
    block_expert,
    weights,
    weight_scales,
    out,
    out_scale,
    flags,
    flag_of,
    status,
    epoch,
    limit,
    blocks,
    assignments,
    top_k,
    depth,
    width,
    W_TYPE: tl.constexpr,
    SCALES: tl.constexpr,
    QUANTIZED: tl.constexpr,
    GATED: tl.constexpr,
    AWAIT: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of an expert's rows times BN of the expert's ``width`` output channels, ``depth`` deep.

    GATED: rows are read by token (``x`` is ``(T, depth)``), channel n of gate and up are computed together and
    ``silu(gate) * up`` is stored, in e4m3 with a scale for the tile's columns if ``QUANTIZED`` with block scales.
    Else ``x`` is ``(capacity, depth)``, in the permutation's order.
    """
    program = tl.program_id(0)
    tiles = (width + BN - 1) // BN
    # GROUP blocks go through the columns together.
    first = program // (GROUP * tiles) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    block = first + program % (GROUP * tiles) % size
    tile = program % (GROUP * tiles) // size
    expert = tl.load(block_expert + block)
    if expert < 0:
        return
    if AWAIT:
        arrived = await_flag(flags, flag_of, expert, epoch, limit)
        if not arrived:
            tl.atomic_max(status, 1)
            return
    place = block.to(tl.int64) * BM + tl.arange(0, BM)
    if GATED:
        # A padding row computes some token's product once more; nobody reads it.
        assignment = tl.load(rows + place)
        row = tl.where(assignment < assignments, assignment // top_k, 0).to(tl.int64)
    else:
        row = place
    column = tile * BN + tl.arange(0, BN)
    inside = column < width
    channel = tl.where(inside, column, 0)
    k = tl.arange(0, BK)
    x_at = x + row[:, None] * depth + k[None, :]
    base = tl.multiple_of(tl.load(weights + expert).to(tl.pointer_type(W_TYPE)), 16)
    weight_at = base + channel[None, :] * depth + k[:, None]
    up_at = weight_at + width * depth
    if SCALES > 0:
        scale_base = tl.load(weight_scales + expert).to(tl.pointer_type(tl.float32))
    if SCALES == 1:
        steps = (depth + SCALE_BLOCK - 1) // SCALE_BLOCK
        scale_at = scale_base + channel // SCALE_BLOCK * steps
        up_scale_at = scale_at + (width + SCALE_BLOCK - 1) // SCALE_BLOCK * steps
        x_scale_at = x_scale + row * steps
    WIDEN: tl.constexpr = (SCALES > 0) and (not QUANTIZED)
    INTEGER: tl.constexpr = (SCALES == 2) and QUANTIZED
    if INTEGER:
        total = tl.full([BM, BN], 0, tl.int32)
        up_total = tl.full([BM, BN], 0, tl.int32)
    else:
        total = tl.full([BM, BN], 0, tl.float32)
        up_total = tl.full([BM, BN], 0, tl.float32)
    for start in range(0, depth, BK):
        left = k < depth - start
        if MASKED:
            values = tl.load(x_at + start, mask=left[None, :], other=0.0)
        else:
            values = tl.load(x_at + start)
        found = load_weights(weight_at + start, left[:, None], MASKED, WIDEN, INTERPRETED)
        if SCALES == 1:
            step = start // SCALE_BLOCK
            if QUANTIZED:
                x_step = tl.load(x_scale_at + step)[:, None]
            else:
                x_step = 1.0
            part = multiply(values, found, None, INTERPRETED)
            total += part * x_step * tl.load(scale_at + step)[None, :]
            if GATED:
                found = load_weights(up_at + start, left[:, None], MASKED, WIDEN, INTERPRETED)
                part = multiply(values, found, None, INTERPRETED)
                up_total += part * x_step * tl.load(up_scale_at + step)[None, :]
        else:
            total = multiply(values, found, total, INTERPRETED)
            if GATED:
                found = load_weights(up_at + start, left[:, None], MASKED, WIDEN, INTERPRETED)
                up_total = multiply(values, found, up_total, INTERPRETED)
    result = total.to(tl.float32)
    up = up_total.to(tl.float32)
    if SCALES == 2:
        result = result * tl.load(scale_base + channel)[None, :]
        up = up * tl.load(scale_base + width + channel, mask=inside & GATED, other=0.0)[None, :]
        if QUANTIZED:
            own = tl.load(x_scale + row)[:, None]
            result = result * own
            up = up * own
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * up
    target = out + place[:, None] * width + column[None, :]
    if GATED and QUANTIZED and SCALES == 1:
        result = tl.where(inside[None, :], result, 0.0)
        scale = tl.maximum(tl.max(tl.abs(result), 1), SMALLEST) / FP8_LARGEST
        result = tl.minimum(tl.maximum(result / scale[:, None], -FP8_LARGEST), FP8_LARGEST)
        tl.store(out_scale + place * tiles + tile, scale)
    tl.store(target, round_to(result, out.dtype.element_ty, INTERPRETED), mask=inside[None, :])


def moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: ExpertTable | PointerTable,
    *,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    quantize_activations: bool = True,
    ready: Ready | None = None,
    config: MoeConfig | None = None,
) -> torch.Tensor:
    """``moe`` of `asyncep_kernels.moe.reference` on a GPU, without host synchronisation.

    In bf16 the gated product and each expert's output are rounded to bf16, everything else is fp32. Against the
    reference: within 2 % of the largest output for bf16 and for quantised experts, 1e-5 for fp32. The order of all
    sums is fixed: the same batch gives the same bits.

    Args, errors: as the reference, except that an id of E or more is ignored as -1 is (looking would wait for the
    device), and that entries must be contiguous and aligned (`pointer_table`). ``experts`` as a `PointerTable` saves
    making one. With ``ready``, blocks go in its order, so that those there first are computed while others come.
    ``config``: tiles, instead of those in ``configs.json``. ``hidden`` must be bf16 for quantised experts.
    """
    if isinstance(experts, ExpertTable):
        check(hidden, topk_ids, topk_weights, experts)
        experts = pointer_table(experts, hidden.device)
    else:
        check_routing(hidden, topk_ids, topk_weights)
        if hidden.shape[1] != experts.hidden:
            raise ValueError(f"hidden {tuple(hidden.shape)} does not fit experts of hidden size {experts.hidden}")
    workspace = workspace or Workspace()
    hidden = hidden.contiguous()
    scheme = Scheme(experts.format, quantize_activations and experts.format is not Format.PLAIN)
    if config is None:
        config = SMALL if INTERPRETED else choose(_architecture(hidden), scheme, topk_ids.numel() / experts.experts)
    misfit = scheme.fits(config)
    if misfit:
        raise ValueError(misfit)
    order = None if ready is None else ready.order
    permutation = permute(topk_ids, experts.experts, config.rows, order=order, workspace=workspace)
    device, inter, width = hidden.device, experts.inter, experts.hidden
    size = permutation.rows.numel()
    x, x_scale = hidden, None
    if scheme.activations:
        x, x_scale = quantize(hidden, experts.dtype, scheme.weights.group(width), workspace=workspace)
    fused = scheme.activations and scheme.weights is Format.FP8
    product = workspace.take("moe.product", (size, inter), experts.dtype if fused else hidden.dtype, device)
    product_scale = None
    if fused:
        product_scale = workspace.take("moe.product_scale", (size, -(-inter // BLOCK)), torch.float32, device)
    gate_up = _Gemm(experts.w13, experts.w13_scale, width, inter, config.gate_up, gated=True)
    gate_up.run(x, x_scale, product, product_scale, permutation, topk_ids, experts, scheme, config, ready)
    if scheme.activations and not fused:
        # `x` is not needed any more, so the workspace's buffers may be taken for these rows.
        product, product_scale = quantize(product, experts.dtype, inter, workspace=workspace)
    results = workspace.take("moe.results", (size, width), hidden.dtype, device)
    down = _Gemm(experts.w2, experts.w2_scale, inter, width, config.down, gated=False)
    down.run(product, product_scale, results, None, permutation, topk_ids, experts, scheme, config, ready)
    return unpermute(results, permutation.position, topk_weights, out=out)


class _Gemm:
    """One of a layer's two GEMMs."""

    def __init__(
        self, weights: torch.Tensor, scales: torch.Tensor | None, depth: int, width: int, tile: Tile, *, gated: bool
    ) -> None:
        self._weights, self._scales = weights, scales
        self._depth, self._width, self._tile, self._gated = depth, width, tile, gated

    def run(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        out: torch.Tensor,
        out_scale: torch.Tensor | None,
        permutation: Permutation,
        topk_ids: torch.Tensor,
        experts: PointerTable,
        scheme: Scheme,
        config: MoeConfig,
        ready: Ready | None,
    ) -> None:
        blocks = permutation.block_expert.numel()
        rows = permutation.rows
        # Arguments that a variant does not look at are given some tensor, as it has none.
        launch(
            expert_gemm_kernel,
            (blocks * triton.cdiv(self._width, self._tile.n),),
            x,
            rows if x_scale is None else x_scale,
            rows,
            permutation.block_expert,
            self._weights,
            self._weights if self._scales is None else self._scales,
            out,
            rows if out_scale is None else out_scale,
            rows if ready is None else ready.flags,
            rows if ready is None else ready.flag_of,
            rows if ready is None else ready.status,
            0 if ready is None else ready.epoch,
            0 if ready is None else ready.limit,
            blocks,
            topk_ids.numel(),
            topk_ids.shape[1],
            self._depth,
            self._width,
            **gemm_meta(scheme, config, self._tile, self._depth, experts.dtype, self._gated, ready is not None),
        )


def gemm_meta(
    scheme: Scheme, config: MoeConfig, tile: Tile, depth: int, dtype: torch.dtype, gated: bool, awaits: bool
) -> dict[str, object]:
    """What `expert_gemm_kernel` is compiled with: its constexprs and the compiler's settings."""
    scales = {Format.PLAIN: NO_SCALES, Format.FP8: BLOCK_SCALES, Format.INT8: ROW_SCALES}[scheme.weights]
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}
    # e4m3 that is widened is read as bytes: devices that have to widen it do not know the type.
    types[torch.float8_e4m3fn] = tl.float8e4nv if scheme.activations else tl.uint8
    return {
        "W_TYPE": types[dtype],
        "SCALES": scales,
        "QUANTIZED": scheme.activations,
        "GATED": gated,
        "AWAIT": awaits,
        "MASKED": depth % tile.k != 0,
        "BM": config.rows,
        "BN": tile.n,
        "BK": tile.k,
        "GROUP": config.group,
        "SCALE_BLOCK": BLOCK,
        "INTERPRETED": INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _architecture(tensor: torch.Tensor) -> str:
    major, _ = torch.cuda.get_device_capability(tensor.device)
    return "sm_80" if major == 8 else "sm_90"
