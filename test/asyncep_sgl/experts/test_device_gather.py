"""Gathers on a device that is none: each stream and event call recorded, each access checked against each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from fake_cuda import FakeDevice, RaceError
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.device_source import DeviceSource
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, slot_layout
from asyncep_sgl.experts.gather.plan import Piece
from asyncep_sgl.experts.gather.slices import slices
from asyncep_sgl.experts.shard.layout import GroupLayout
from asyncep_sgl.experts.sources.cuda import CudaSource, Shard
from asyncep_sgl.experts.sources.pinned import PinnedSource

WIDTH, INTER = 8, 4


@dataclass
class Model:
    """Every layer's experts, and one rank's view of them."""

    experts: int
    layers: int
    ranks: int
    rank: int
    tensors: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for layer in range(self.layers):
            for name, shape in (("w13_weight", (2 * INTER, WIDTH)), ("w2_weight", (WIDTH, INTER))):
                self.tensors[layer, name] = torch.randn(self.experts, *shape, generator=generator).bfloat16()

    @property
    def layout(self) -> GroupLayout:
        return GroupLayout(self.experts, self.ranks, 1)

    def gathered(self, *, everything: bool = False) -> list[GatheredLayer]:
        found = []
        for layer in range(self.layers):
            whole = {name: tensor for (at, name), tensor in self.tensors.items() if at == layer}
            missing = frozenset(range(self.experts)) if everything else self.layout.missing(layer, self.rank)
            own = {name: tensor.clone() for name, tensor in whole.items()}
            for tensor in own.values():
                tensor[sorted(missing)] = float("nan")
            if missing:
                found.append(GatheredLayer(layer, own, slot_layout(own, missing)))
        return found

    def shards(self) -> dict[tuple[int, int, str], Shard]:
        found = {}
        for rank in range(self.ranks):
            for (layer, name), tensor in self.tensors.items():
                owned = sorted(self.layout.held(layer, rank))
                if rank != self.rank and owned:
                    run = range(owned[0], owned[-1] + 1)
                    found[rank, layer, name] = Shard(run, tensor[run.start : run.stop].view(-1).view(torch.uint8))
        return found


def compute(device: FakeDevice, gather: ExpertGather, model: Model, layer: int) -> None:
    """What the forward pass queues: reads of the whole table, which has to hold this layer and nothing else."""
    table = gather.wait(layer)
    stream = device.current_stream()
    for name, side in (("w13_weight", table.w13), ("w2_weight", table.w2)):
        for expert, entry in enumerate(side):
            device.touch(stream, entry, write=False, what="the layer reads")
            assert torch.equal(entry, model.tensors[layer, name][expert]), f"layer {layer}, expert {expert}"


histories = st.lists(
    # Layers computed, whether the last one is left in the middle, which stream the forward pass is on.
    st.tuples(st.integers(0, 4), st.booleans(), st.booleans()),
    min_size=1,
    max_size=5,
)


def run_history(device: FakeDevice, gather: ExpertGather, model: Model, history: list[tuple[int, bool, bool]]) -> None:
    other = device.new_stream()
    layers = list(gather.layers)
    for computed, left_in_use, elsewhere in history:
        with device.on(other) if elsewhere else nothing():
            if elsewhere or other.clock:
                # SGLang's own order between its streams: the pass before has been handed over.
                for stream in (*device._streams[:1], other):
                    device.wait(device.current_stream(), device.record(stream))
            gather.begin()
            for position, layer in enumerate(layers[:computed]):
                for _ in range(100):
                    try:
                        compute(device, gather, model, layer)
                        break
                    except GatherError:
                        continue
                if left_in_use and position == computed - 1:
                    break
                gather.release(layer)
    assert device.synchronized == 0, "the host waited on the forward path"


@contextmanager
def nothing() -> Iterator[None]:
    yield


@settings(max_examples=60, deadline=None)
@given(
    history=histories,
    depth=st.integers(1, 3),
    lanes=st.integers(1, 3),
    slice_bytes=st.sampled_from([16, 40, 1 << 20]),
    shape=st.tuples(st.integers(2, 7), st.integers(1, 4), st.integers(2, 4)),
    failures=st.frozensets(st.integers(0, 12), max_size=4),
)
def test_peers_experts_are_never_read_before_they_are_there_nor_overwritten_while_read(
    history: list[tuple[int, bool, bool]],
    depth: int,
    lanes: int,
    slice_bytes: int,
    shape: tuple[int, int, int],
    failures: frozenset[int],
) -> None:
    experts, layers, ranks = shape
    model = Model(experts, layers, ranks, rank=ranks - 1)
    device = FakeDevice(failures=failures)
    source = CudaSource(device, model.shards(), rank=model.rank, ranks=ranks, lanes=lanes, slice_bytes=slice_bytes)
    run_history(device, ExpertGather(model.gathered(), source, depth), model, history)


@settings(max_examples=30, deadline=None)
@given(history=histories, depth=st.integers(1, 4), failures=st.frozensets(st.integers(0, 12), max_size=4))
def test_experts_in_host_memory_likewise(
    history: list[tuple[int, bool, bool]], depth: int, failures: frozenset[int]
) -> None:
    model = Model(5, 4, 1, rank=0)
    device = FakeDevice(failures=failures)
    source = PinnedSource(device, lambda layer, name: model.tensors[layer, name])
    gather = ExpertGather(model.gathered(everything=True), source, depth)
    assert device.pinned == {tensor.data_ptr() for tensor in model.tensors.values()}
    run_history(device, gather, model, history)


class Careless(CudaSource):
    """Leaves out one kind of order."""

    leaves_out = ""

    def start(self, layer: int, slot: int) -> object:  # type: ignore[override]
        if self.leaves_out == "read, then overwritten":
            self._readers.clear()
            self.forward_stream = lambda: self.device.current_stream()  # type: ignore[method-assign]
        if self.leaves_out == "written, then overwritten":
            self._written.clear()
        fetch = super().start(layer, slot)
        return fetch if self.leaves_out != "written, then read" else fetch.__class__(self, fetch.begun, [], None)


@pytest.mark.parametrize("left_out", ["read, then overwritten", "written, then overwritten", "written, then read"])
def test_the_fake_notices_an_order_that_is_missing(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(6, 3, 3, rank=0)
    device = FakeDevice()
    source = Careless(device, model.shards(), rank=0, ranks=3, lanes=3, slice_bytes=48)
    monkeypatch.setattr(Careless, "leaves_out", left_out)
    gather = ExpertGather(model.gathered(), source, 1)

    def careless() -> None:
        if left_out == "written, then overwritten":
            # Given up before anything read it; the next layer's bytes are divided over the lanes in another way.
            source.start(0, 0)
            source._slice_bytes = 80
            source.start(1, 0)
        else:
            run_history(device, gather, model, [(3, False, False)])

    with pytest.raises(RaceError):
        careless()


def test_the_clock_is_the_devices() -> None:
    model = Model(4, 3, 2, rank=0)
    device = FakeDevice()
    gather = ExpertGather(model.gathered(), CudaSource(device, model.shards(), rank=0, ranks=2), 2)
    assert len(gather.measure()) == 6
    for _ in range(2):
        gather.begin()
        for layer in range(3):
            compute(device, gather, model, layer)
            gather.release(layer)
    # A scheduler that is a batch ahead finds both, each once.
    for _ in range(2):
        trace = gather.take_trace()
        assert [entry.layer for entry in trace] == [0, 1, 2]
        assert all(entry.gather is not None and entry.gather.exact and entry.gather.seconds > 0 for entry in trace)
        assert all(entry.exposed >= 0 for entry in trace)
        assert all(entry.window is not None and entry.window > 0 for entry in trace[:-1])
        assert trace[-1].window is None
    assert gather.take_trace() == []
    gather.begin()
    assert gather.take_trace() == []


def test_what_nobody_shares_is_said_at_once() -> None:
    model = Model(4, 1, 2, rank=0)
    with pytest.raises(GatherError, match="rank 0 finds no shard with every missing expert of layer 0"):
        ExpertGather(model.gathered(), CudaSource(FakeDevice(), {}, rank=0, ranks=2), 2)
    cut = {key: shard._replace(data=shard.data[:-2]) for key, shard in model.shards().items()}
    with pytest.raises(GatherError, match="start every rank with the same model and --dtype"):
        ExpertGather(model.gathered(), CudaSource(FakeDevice(), cut, rank=0, ranks=2), 2)


def test_closing_waits_for_every_side_stream() -> None:
    device = FakeDevice()
    source: DeviceSource = CudaSource(device, {}, rank=0, ranks=2, lanes=3)
    source.close()
    assert device.synchronized == 3


@given(
    sizes=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), max_size=6),
    reader=st.integers(0, 5),
    largest=st.integers(1, 128),
)
def test_slices_cover_every_byte_once_and_take_turns(sizes: list[tuple[int, int]], reader: int, largest: int) -> None:
    pieces, offset = [], 0
    for node, nbytes in sizes:
        pieces.append(Piece(node, "w", range(0, 1), offset, nbytes))
        offset += nbytes
    cut = slices(pieces, reader, 6, largest)
    assert all(part.nbytes <= largest for part in cut)
    assert sorted(b for part in cut for b in range(part.target, part.target + part.nbytes)) == list(range(offset))
    for node in {part.node for part in cut}:
        # Between two slices of a peer every other one that still has some has had its turn.
        turns = [at for at, part in enumerate(cut) if part.node == node]
        for before, after in itertools.pairwise(turns):
            between = [part.node for part in cut[before + 1 : after]]
            assert len(between) == len(set(between))
    if cut:
        assert cut[0].node == min({part.node for part in cut}, key=lambda node: (node - reader - 1) % 6)


def test_slices_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="slices of 0 bytes"):
        slices([], 0, 1, 0)
