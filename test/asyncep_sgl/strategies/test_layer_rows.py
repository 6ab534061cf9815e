"""A layer's rows computed in any pieces and order are the kernel's own result, bit for bit."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_kernels.moe import cpu
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.workspace import Workspace
from asyncep_sgl.strategies.base import TopK
from asyncep_sgl.strategies.layer_rows import LayerRows

EXPERTS, WIDTH, INTER, TOP = 8, 64, 32, 3


def table() -> ExpertTable:
    generator = torch.Generator().manual_seed(5)
    w13 = torch.randn(EXPERTS, 2 * INTER, WIDTH, generator=generator) / 8
    w2 = torch.randn(EXPERTS, WIDTH, INTER, generator=generator) / 6
    return ExpertTable(w13.bfloat16(), w2.bfloat16())


def layer(tokens: int, seed: int) -> tuple[torch.Tensor, TopK]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)]).int()
    return hidden, TopK(ids, torch.rand(tokens, TOP, generator=generator))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(0, 99), st.lists(st.integers(0, EXPERTS - 1), max_size=30))
def test_experts_may_be_computed_in_any_order(tokens: int, seed: int, order: list[int]) -> None:
    hidden, topk = layer(tokens, seed)
    rows = LayerRows(hidden, topk, table(), Workspace())
    rows.results.fill_(float("nan"))
    found = 0
    for expert in [*dict.fromkeys(order), *(set(range(EXPERTS)) - set(order))]:
        found += rows.compute([expert], table())
    assert found == tokens * TOP
    assert torch.equal(rows.combined(), cpu.moe(hidden, topk.ids, topk.weights, table()))


@given(
    st.integers(1, 200),
    st.integers(0, 99),
    st.sets(st.integers(0, EXPERTS - 1), min_size=1),
    st.integers(1, 6),
)
def test_pieces_have_each_row_once_and_tokens_apart(tokens: int, seed: int, experts: set[int], pieces: int) -> None:
    hidden, topk = layer(tokens, seed)
    rows = LayerRows(hidden, topk, table(), Workspace())
    found = rows.by_tokens(experts, pieces)
    assert len(found) <= pieces
    assert all(piece and all(len(place) for place in piece.values()) for piece in found)
    places = sorted(row for piece in found for place in piece.values() for row in place)
    assert places == [row for e in sorted(experts) for row in range(rows.starts[e], rows.starts[e + 1])]
    of_pieces = [{int(rows.order.tokens[row]) for place in piece.values() for row in place} for piece in found]
    for earlier, later in itertools.pairwise(of_pieces):
        assert max(earlier) < min(later)
