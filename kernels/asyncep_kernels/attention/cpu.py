"""``attention`` on CPUs: in C where `cpu_native` serves; else, which is what this file has, by tiles of scores that
stay in the L2 cache, computed by oneDNN's GEMMs.

torch's flash kernel runs bf16 GEMMs at a tenth of the core's peak where there is no AMX. Here a tile's scores are one
fp32 GEMM (a bf16 one would round the scores to 8 bits), its softmax is in base 2 (``exp2`` is vectorised in torch,
``exp`` goes to MKL, which is 13 times slower on CPUs that are not Intel's), and its product with the values is a
bf16 GEMM. The query heads of a key head are folded into a tile's rows, so keys and values are never expanded.

oneDNN compiles a kernel for every new shape, 0.6 ms each, so a tile's sides are rounded up to one of a few sizes: it
then reads its neighbours' rows, hidden as keys and dropped as queries.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn import functional as F

from asyncep_kernels.attention import cpu_native
from asyncep_kernels.attention.batch import check
from asyncep_kernels.attention.plan import Own, Padded, Plan, Shared
from asyncep_kernels.workspace import Workspace

# Rows (queries x folded heads) and keys of a tile: 256 x 1024 fp32 scores are the L2 cache of one core.
TILE_ROWS = 256
TILE_KEYS = 1024
ROW_STEP = 32
KEY_STEP = 64
# Scores of a batched GEMM over short sequences.
TILE_BYTES = 1 << 19
# Instead of -inf, so that a row with every key of a tile hidden stays finite; its weight is zero once merged.
HIDDEN = -1e30


class Part(NamedTuple):
    """Attention over some of the keys."""

    out: torch.Tensor
    """``(..., rows, Dv)``: normalised over those keys."""
    lse: torch.Tensor
    """``(..., rows, 1)`` fp32: base-2 logarithm of the sum of ``2**score`` over them."""


class _Layer(NamedTuple):
    """One layer's tensors, head-major."""

    q: torch.Tensor
    """``(Hkv, T + ROW_STEP, G, D)`` fp32, scaled to base 2; zeros at the end."""
    k: torch.Tensor
    """``(Hkv, own keys + KEY_STEP, D)`` fp32; zeros at the end."""
    v: torch.Tensor
    """``(Hkv, own keys + KEY_STEP, Dv)``, likewise."""
    out: torch.Tensor
    """``(Hkv, T, G, Dv)``, a view of the result."""
    before: Part | None
    """``(Hkv, T, G, ..)``: over the shared prefixes; weightless (lse `HIDDEN`) in rows that have none."""


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Plan,
    *,
    scale: float,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """``attention`` of `asyncep_kernels.attention.reference`, for fp32 and bf16 on CPUs.

    In bf16 the softmax's weights are rounded to bf16, scores and sums are fp32. Against the
    reference: within 1.5 % of the largest value for bf16, 1e-5 for fp32.

    Args, errors: as the reference. ``workspace`` keeps the scratch memory (the batch's q and own k in fp32, own v)
    for the next call.
    """
    check(q, k_cache, v_cache, plan.batch, plan.window)
    workspace = workspace or Workspace()
    tokens, heads, dim = q.shape
    kv_heads, v_dim = k_cache.shape[1], v_cache.shape[2]
    group = heads // kv_heads
    if out is None:
        out = torch.empty(tokens, heads, v_dim, dtype=q.dtype)
    if tokens == 0:
        return out
    if cpu_native.serves(q, k_cache, v_cache, out):
        return cpu_native.attention(q, k_cache, v_cache, plan.native, scale=scale, window=plan.window, out=out)
    cut = plan.cut
    folded = workspace.take("attention.q", (kv_heads, tokens + ROW_STEP, group, dim), torch.float32)
    folded[:, tokens:].zero_()
    folded[:, :tokens].copy_(q.view(tokens, kv_heads, group, dim).transpose(0, 1))
    folded.mul_(scale * math.log2(math.e))
    if cut.slots is not None:
        new_kv = k_cache.index_select(0, cut.slots), v_cache.index_select(0, cut.slots)
    elif new_kv is None:
        slots = torch.cat([s[p : p + n] for n, p, s in zip(*plan.batch, strict=True)])
        new_kv = k_cache.index_select(0, slots), v_cache.index_select(0, slots)
    k, v = _head_major(*new_kv, workspace, "own")
    before = _attend_shared(folded, k_cache, v_cache, cut.shared, workspace) if cut.shared else None
    layer = _Layer(folded, k, v, out.view(tokens, kv_heads, group, v_dim).transpose(0, 1), before)
    for sequence in cut.singles:
        _attend_single(layer, sequence, plan.window, workspace)
    for padded in cut.padded:
        _attend_padded(layer, padded, workspace)
    return out


def merge(one: Part, other: Part) -> Part:
    """Attention over two disjoint sets of keys from that over each."""
    lse = torch.logaddexp2(one.lse, other.lse)
    return Part(one.out * torch.exp2(one.lse - lse) + other.out * torch.exp2(other.lse - lse), lse)


def _head_major(k: torch.Tensor, v: torch.Tensor, workspace: Workspace, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows, Hkv, ..)`` as ``(Hkv, rows, ..)``: keys in fp32, values as they are."""
    rows, heads, dim = k.shape
    keys = workspace.take(f"attention.{name}.k", (heads, rows + KEY_STEP, dim), torch.float32)
    values = workspace.take(f"attention.{name}.v", (heads, rows + KEY_STEP, v.shape[2]), v.dtype)
    keys[:, rows:].zero_()
    values[:, rows:].zero_()
    keys[:, :rows].copy_(k.transpose(0, 1))
    values[:, :rows].copy_(v.transpose(0, 1))
    return keys, values


def _attend_shared(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, groups: tuple[Shared, ...], workspace: Workspace
) -> Part:
    """Every group's queries over its prefix: no mask, all sequences in the same tiles."""
    heads, tokens, folds, _ = q.shape
    out = workspace.take("attention.before", (heads, tokens, folds, v_cache.shape[2]), torch.float32).zero_()
    lse = workspace.take("attention.before.lse", (heads, tokens, folds, 1), torch.float32).fill_(HIDDEN)
    for group in groups:
        k, v = _head_major(
            k_cache.index_select(0, group.slots), v_cache.index_select(0, group.slots), workspace, "shared"
        )
        length = group.slots.numel()
        for rows in group.rows.split(max(1, TILE_ROWS // folds)):
            # Some valid row as often as it takes.
            taken = F.pad(rows, (0, -rows.numel() % _query_step(folds)), value=int(rows[0]))
            mask = _hide_rest(taken.numel(), length)
            for head in range(heads):
                part = _over_keys(
                    q[head].index_select(0, taken).flatten(0, 1), k[head], v[head], mask, length, workspace
                )
                part_out, part_lse = part.out.float().view(-1, folds, v.shape[2]), part.lse.view(-1, folds, 1)
                out[head].index_copy_(0, rows, part_out[: rows.numel()])
                lse[head].index_copy_(0, rows, part_lse[: rows.numel()])
    return Part(out, lse)


def _attend_single(layer: _Layer, sequence: Own, window: int | None, workspace: Workspace) -> None:
    """One sequence, block by block of its queries, each over the keys up to the block's end."""
    heads, _, folds, _ = layer.q.shape
    step = _query_step(folds)
    block = max(step, TILE_ROWS // folds)
    first, last = sequence.query, sequence.query + sequence.new
    for start in range(first, last, block):
        end = min(start + block, last)
        queries = end - start
        rounded = _round_up(queries, step)
        position = sequence.prefix + start - first
        low = 0 if window is None else max(0, position - window)
        length = position + queries - low
        if window is None:
            mask = _triangle(rounded, rounded - queries, _round_up(length, KEY_STEP) - length)
        else:
            mask = _band(rounded, position - low, _round_up(length, KEY_STEP), window)
        for head in range(heads):
            part = _over_keys(
                layer.q[head, start : start + rounded].flatten(0, 1),
                layer.k[head, sequence.key + low :],
                layer.v[head, sequence.key + low :],
                mask,
                length,
                workspace,
            )
            found = part.out.view(rounded, folds, -1)[:queries]
            if layer.before is not None:
                earlier = Part(layer.before.out[head, start:end], layer.before.lse[head, start:end])
                found = merge(earlier, Part(found, part.lse.view(rounded, folds, 1)[:queries])).out
            layer.out[head, start:end] = found


def _over_keys(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, length: int, workspace: Workspace
) -> Part:
    """Rows of one key head over ``length`` keys, rounded up, tile by tile from the last.

    Args:
        q: ``(queries * G, D)``.
        k: ``(length rounded up or more, D)``; v alike.
        mask: ``(queries, n)``: added to the scores of the last n keys, those too many included.
    """
    hidden = 0 if mask is None else mask.shape[1]
    end = _round_up(length, KEY_STEP)
    whole: Part | None = None
    while end > 0:
        start = max(0, end - max(TILE_KEYS, _round_up(hidden, KEY_STEP)))
        # A rest too small to be worth a tile of its own goes into this one.
        start = 0 if start < TILE_KEYS // 4 else start
        scores = _scores(q, k[start:end])
        if mask is not None:
            scores.view(mask.shape[0], -1, end - start)[:, :, end - start - hidden :].add_(mask.unsqueeze(1))
            mask, hidden = None, 0
        weights, lse = _softmax(scores)
        part = Part(torch.mm(_rounded(weights, v.dtype, workspace), v[start:end]), lse)
        whole = part if whole is None else merge(whole, part)
        end = start
    if whole is None:
        raise ValueError("no keys to attend to")
    return whole


def _attend_padded(layer: _Layer, padded: Padded, workspace: Workspace) -> None:
    """A group of short sequences as one batched GEMM over (head, sequence)."""
    heads, _, folds, _ = layer.q.shape
    count, n = padded.queries.shape
    m = padded.keys.shape[1]
    out = workspace.take("attention.padded", (heads, count, n * folds, layer.v.shape[2]), torch.float32)
    lse = workspace.take("attention.padded.lse", (heads, count, n * folds, 1), torch.float32)
    step = max(1, TILE_BYTES // (4 * heads * n * folds * m))
    for first in range(0, count, step):
        some = slice(first, min(first + step, count))
        keys = padded.keys[some].flatten()
        q = layer.q.index_select(1, padded.queries[some].flatten()).view(-1, n * folds, layer.q.shape[3])
        k = layer.k.index_select(1, keys).view(-1, m, layer.k.shape[2])
        # fp32 also here: MKL's batched GEMM compiles nothing, and the matrices are small.
        v = layer.v.index_select(1, keys).view(-1, m, layer.v.shape[2]).float()
        scores = workspace.take("attention.scores", (q.shape[0], n * folds, m), torch.float32)
        torch.bmm(q, k.transpose(1, 2), out=scores)
        scores.view(-1, n, folds, m)[..., m - n :].add_(_triangle(n).unsqueeze(1))
        if padded.missing is not None:
            scores.view(heads, -1, n * folds, m).masked_fill_(padded.missing[some][:, None], HIDDEN)
        weights, some_lse = _softmax(scores)
        lse[:, some] = some_lse.view(heads, -1, n * folds, 1)
        out[:, some] = torch.bmm(weights, v).view(heads, -1, n * folds, v.shape[2])
    out, lse = out.view(heads, count * n, folds, -1), lse.view(heads, count * n, folds, 1)
    if padded.valid is not None:
        out, lse = out.index_select(1, padded.valid), lse.index_select(1, padded.valid)
    if layer.before is not None:
        rows = padded.rows
        earlier = Part(layer.before.out.index_select(1, rows), layer.before.lse.index_select(1, rows))
        out = merge(earlier, Part(out, lse)).out
    layer.out.index_copy_(1, padded.rows, out.to(layer.out.dtype))


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``q @ k.T`` in fp32: oneDNN's GEMM, twice as fast as MKL's on CPUs that are not Intel's."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(q, k, None, "none", [], "")
    return F.linear(q, k)


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Base-2 softmax over the last dimension, in place, and its log-sum-exp."""
    largest = scores.amax(-1, keepdim=True)
    total = scores.sub_(largest).exp2_().sum(-1, keepdim=True)
    return scores.mul_(total.reciprocal()), total.log2().add_(largest)


def _rounded(weights: torch.Tensor, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
    if weights.dtype == dtype:
        return weights
    return workspace.take("attention.weights", tuple(weights.shape), dtype).copy_(weights)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _query_step(folds: int) -> int:
    return max(1, ROW_STEP // folds)


@lru_cache(maxsize=256)
def _triangle(queries: int, idle: int = 0, excess: int = 0) -> torch.Tensor:
    """``(queries, queries - idle + excess)``: 0 up to the diagonal, `HIDDEN` after it.

    The last ``idle`` queries have no keys of their own; the last ``excess`` keys are no query's.
    """
    return torch.full((queries, queries - idle + excess), HIDDEN).triu_(1)


@lru_cache(maxsize=256)
def _band(queries: int, behind: int, keys: int, window: int) -> torch.Tensor:
    """``(queries, keys)``: 0 for the query itself, which ``behind`` keys precede, and the ``window`` keys before it."""
    distance = torch.arange(behind, behind + queries)[:, None] - torch.arange(keys)
    return torch.where((distance >= 0) & (distance <= window), 0.0, HIDDEN)


def _hide_rest(queries: int, length: int) -> torch.Tensor | None:
    """Hides the keys by which ``length`` was rounded up; None when there are none."""
    rest = _round_up(length, KEY_STEP) - length
    return torch.full((queries, rest), HIDDEN) if rest else None
