"""What is read from whom, and where it goes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.experts.gather.plan import SlotLayout, choose, pieces
from asyncep_sgl.experts.gather.window import WindowModel, peak_threshold
from asyncep_sgl.experts.shard.layout import GroupLayout


@given(
    experts=st.integers(1, 60),
    nodes=st.integers(2, 5),
    ranks=st.integers(1, 3),
    layer=st.integers(0, 5),
    data=st.data(),
)
def test_every_missing_expert_is_read_once_from_a_host_that_has_it(
    experts: int, nodes: int, ranks: int, layer: int, data: st.DataObject
) -> None:
    copies = data.draw(st.integers(1, nodes))
    dead = data.draw(st.sets(st.integers(1, nodes - 1)))
    layout = GroupLayout(experts, nodes, ranks, copies)
    missing = tuple(sorted(layout.missing(layer, 0)))
    holders = {node: layout.held(layer, node) for node in range(1, nodes) if node not in dead}
    chosen = choose(missing, holders, 0, nodes)
    if chosen is None:
        assert not set(missing) <= set().union(*holders.values())
        return
    slot = SlotLayout(missing, {"w13": 24, "w2": 10})
    filled = bytearray(slot.nbytes)
    for piece in pieces(slot, chosen):
        assert set(piece.experts) <= holders[piece.node]
        assert piece.nbytes == len(piece.experts) * slot.strides[piece.name]
        for at, expert in enumerate(piece.experts):
            start = piece.offset + at * slot.strides[piece.name]
            assert start == slot.offset(piece.name, expert)
            for byte in range(start, start + slot.strides[piece.name]):
                filled[byte] += 1
    assert all(count == 1 for count in filled)


@given(fixed=st.floats(0, 0.05), per_gflop=st.floats(0.001, 0.1), gather=st.floats(0.06, 1))
def test_the_window_is_found_again_and_with_it_the_saturation(fixed: float, per_gflop: float, gather: float) -> None:
    model = WindowModel()
    for gflops in (1, 2, 5, 10, 3, 7):
        model.add(gflops * 1e9, fixed + per_gflop * gflops)
    found_fixed, per_flop = model.line()
    assert abs(found_fixed - fixed) < 1e-6
    assert abs(per_flop * 1e9 - per_gflop) < 1e-6
    saturation = model.saturation(gather)
    assert saturation is not None
    assert abs(fixed + per_gflop * saturation / 1e9 - gather) < 1e-4


def test_t_after_the_paper() -> None:
    assert peak_threshold(0.2, 210e9, 1.2) == 0.2 * 210e9 * 1.2
    assert WindowModel().saturation(1.0) is None
