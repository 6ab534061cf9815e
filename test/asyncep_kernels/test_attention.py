"""The attention kernel against its fp32 reference, on batches of any shape."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncep_kernels.attention import cpu, reference
from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.attention.plan import plan
from asyncep_kernels.workspace import Workspace

# Largest error over largest value; see `cpu.attention`.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.015}


class Case(NamedTuple):
    new: list[int]
    prefix: list[int]
    shared: list[int]
    """Of each sequence's prefix, tokens it has in common with every other's."""
    page: int = 1
    kv_heads: int = 2
    group: int = 2
    v_dim: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    seed: int = 0


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
    """A cache whose pages are handed out in random order, and the batch that lies in it."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [new + prefix for new, prefix in zip(case.new, case.prefix, strict=True)]
    pages = 2 + sum(-(-length // case.page) for length in lengths) + -(-max([*case.shared, 1]) // case.page)
    free = (torch.randperm(pages, generator=generator)[:, None] * case.page + torch.arange(case.page)).flatten()
    # Shared prefixes of several lengths are heads of one another, whole pages of course.
    taken = -(-max([*case.shared, 1]) // case.page) * case.page
    common = free[:taken]
    slots = []
    for length, shared in zip(lengths, case.shared, strict=True):
        shared = min(shared, length) // case.page * case.page
        own = -(-(length - shared) // case.page) * case.page
        slots.append(torch.cat([common[:shared], free[taken : taken + own]])[:length].int())
        taken += own
    tokens = sum(case.new)
    q = torch.randn(tokens, case.kv_heads * case.group, 24, generator=generator).to(case.dtype)
    k = torch.randn(pages * case.page, case.kv_heads, 24, generator=generator).to(case.dtype)
    v = torch.randn(pages * case.page, case.kv_heads, case.v_dim, generator=generator).to(case.dtype)
    return q, k, v, Batch(case.new, case.prefix, slots)


def compare(case: Case, *, pass_new: bool = False) -> None:
    q, k, v, batch = tensors(case)
    work = plan(batch, case.window)
    exact = reference.attention(q.float(), k.float(), v.float(), work, scale=0.3)
    new = torch.cat([s[p:] for p, s in zip(batch.prefix, batch.slots, strict=True)]) if case.new else []
    found = cpu.attention(q, k, v, work, scale=0.3, new_kv=(k[new], v[new]) if pass_new else None)
    assert found.dtype == q.dtype
    assert found.shape == exact.shape
    if exact.numel():
        assert (found.float() - exact).abs().max() <= TOLERANCE[case.dtype] * v.float().abs().max()


lengths = st.one_of(st.integers(0, 20), st.integers(0, 200))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 6))
    many = st.lists(lengths, min_size=count, max_size=count)
    prefix = draw(many)
    shared = [min(p, s) for p, s in zip(prefix, draw(many), strict=True)] if draw(st.booleans()) else [0] * count
    return Case(
        draw(many),
        prefix,
        shared,
        page=draw(st.sampled_from([1, 4, 16])),
        kv_heads=draw(st.sampled_from([1, 3])),
        group=draw(st.sampled_from([1, 2, 7])),
        v_dim=draw(st.sampled_from([8, 24])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        window=draw(st.one_of(st.none(), st.integers(0, 150))),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans())
@example(Case([8] * 40, [100] * 40, [64] * 40), False)
@example(Case([8] * 40, [0] * 40, [0] * 40), True)
@example(Case([300, 5], [2300, 0], [0, 0]), False)
@example(Case([40, 30], [1500, 1400], [1400, 1400]), True)
@example(Case([700], [2500], [0], window=1300), False)
@example(Case([700], [2500], [0], window=100, dtype=torch.float32), False)
def test_any_batch_is_as_in_fp32(case: Case, pass_new: bool) -> None:
    compare(case, pass_new=pass_new)


def test_large_scores_do_not_overflow() -> None:
    q, k, v, batch = tensors(Case([150, 12, 9], [1200, 3, 0], [0, 0, 0]))
    work = plan(batch)
    exact = reference.attention(100 * q.float(), 10 * k.float(), v.float(), work, scale=1.0)
    found = cpu.attention(100 * q, 10 * k, v, work, scale=1.0)
    assert (found.float() - exact).abs().median() < 0.01
    assert found.isfinite().all()


def test_scratch_memory_carries_nothing_over() -> None:
    workspace = Workspace()
    for case in (Case([200, 30], [90, 90], [64, 64], seed=1), Case([20, 30], [90, 90], [64, 64])):
        q, k, v, batch = tensors(case)
        if case.seed:
            q.fill_(float("nan"))
        found = cpu.attention(q, k, v, plan(batch), scale=0.3, workspace=workspace)
    exact = reference.attention(q.float(), k.float(), v.float(), plan(batch), scale=0.3)
    assert (found.float() - exact).abs().max() < 0.05


def test_a_common_prefix_is_planned_once() -> None:
    *_, batch = tensors(Case([8] * 3 + [9], [100] * 3 + [70], [64] * 3 + [0]))
    work = plan(batch)
    assert [len(each.slots) for each in work.cut.shared] == [64]
    assert work.cut.own_keys == 3 * (100 - 64 + 8) + 70 + 9


def test_many_short_sequences_are_few_groups() -> None:
    *_, batch = tensors(Case([8, 9, 10] * 10, [0] * 30, [0] * 30))
    work = plan(batch)
    assert not work.cut.singles
    assert len(work.cut.padded) <= 2


def test_errors_name_what_does_not_fit() -> None:
    q, k, v, batch = tensors(Case([8], [3], [0]))
    with pytest.raises(ValueError, match="q has 7 rows, the batch 8"):
        cpu.attention(q[:7], k, v, plan(batch), scale=1.0)
    with pytest.raises(ValueError, match="dtypes differ"):
        cpu.attention(q.float(), k, v, plan(batch), scale=1.0)
    with pytest.raises(ValueError, match="with 11 slots"):
        plan(Batch([9], [3], batch.slots))
