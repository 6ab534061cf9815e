"""The layout's promises, for any number of experts and ranks."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.experts.shard.layout import ExpertLayout, GroupLayout, runs

counts = st.integers(1, 130)
layers = st.integers(0, 100)


@given(experts=counts, ranks=counts, layer=layers)
def test_every_expert_has_exactly_one_owner(experts: int, ranks: int, layer: int) -> None:
    layout = ExpertLayout(experts, ranks)
    owned = [expert for rank in range(ranks) for expert in layout.owned(layer, rank)]
    assert sorted(owned) == list(range(experts))


@given(experts=counts, ranks=counts, layer=layers)
def test_owner_and_owned_agree(experts: int, ranks: int, layer: int) -> None:
    layout = ExpertLayout(experts, ranks)
    for expert in range(experts):
        assert expert in layout.owned(layer, layout.owner(layer, expert))


@given(experts=counts, ranks=counts, depth=st.integers(1, 60))
def test_shares_differ_by_at_most_one_expert_over_the_whole_model(experts: int, ranks: int, depth: int) -> None:
    layout = ExpertLayout(experts, ranks)
    shares = [sum(len(layout.owned(layer, rank)) for layer in range(depth)) for rank in range(ranks)]
    assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize(("experts", "ranks"), [(0, 1), (1, 0), (-1, 2)])
def test_empty_layouts_are_refused(experts: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="needs experts and ranks"):
        ExpertLayout(experts, ranks)


def test_unknown_rank_and_expert_are_refused() -> None:
    layout = ExpertLayout(8, 3)
    with pytest.raises(IndexError):
        layout.owned(0, 3)
    with pytest.raises(IndexError):
        layout.owner(0, 8)


@st.composite
def groups(draw: st.DrawFn) -> GroupLayout:
    nodes = draw(st.integers(1, 5))
    return GroupLayout(
        experts=draw(counts),
        nodes=nodes,
        ranks=draw(st.integers(1, 4)),
        copies=draw(st.integers(1, nodes)),
        resident=frozenset(draw(st.sets(st.integers(0, 5)))),
        kept=draw(st.integers(0, 6)),
    )


@given(group=groups(), layer=st.integers(0, 8))
def test_every_expert_lies_on_as_many_hosts_as_it_has_copies(group: GroupLayout, layer: int) -> None:
    held = [group.held(layer, node) for node in range(group.nodes)]
    copies = group.nodes if layer in group.resident else group.copies
    plain = replace(group, kept=0)
    for expert in range(group.experts):
        assert sum(expert in plain.held(layer, node) for node in range(group.nodes)) == copies
    for node in range(group.nodes):
        assert group.missing(layer, node) | held[node] == set(range(group.experts))
        # What is kept beyond that shortens every host's gather by as much, as far as there is anything to gather.
        assert len(group.missing(layer, node)) == max(0, len(plain.missing(layer, node)) - group.kept)


@given(group=groups(), layer=st.integers(0, 8))
def test_the_ranks_of_a_host_read_each_of_its_experts_once(group: GroupLayout, layer: int) -> None:
    for node in range(group.nodes):
        read = [expert for rank in range(group.ranks) for expert in group.read_by(layer, node, rank)]
        assert sorted(read) == sorted(group.held(layer, node))


@given(experts=counts, ranks=st.integers(1, 9), layer=layers)
def test_one_host_divides_as_the_plain_layout(experts: int, ranks: int, layer: int) -> None:
    group, plain = GroupLayout(experts, 1, ranks), ExpertLayout(experts, ranks)
    for rank in range(ranks):
        assert group.read_by(layer, 0, rank) == frozenset(plain.owned(layer, rank))


@given(experts=st.sets(st.integers(0, 60)))
def test_runs_cover_a_set_with_the_fewest_ranges(experts: set[int]) -> None:
    found = runs(frozenset(experts))
    assert [expert for run in found for expert in run] == sorted(experts)
    assert all(a.stop < b.start for a, b in itertools.pairwise(found))
