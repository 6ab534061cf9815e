"""What every `LayerSource` owes the gather, asked of each one: files, hosts, devices, host memory, a collective.

A new source is one more maker in `SOURCES`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import test_on_disk
import test_peer_source
import torch
from fake_cuda import FakeDevice
from test_device_gather import Model

from asyncep_sgl.errors import GatherError, StoreError
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, LayerSource
from asyncep_sgl.experts.group.view import ViewClient
from asyncep_sgl.experts.sources.cuda import CudaSource, Shard
from asyncep_sgl.experts.sources.files import FileSource
from asyncep_sgl.experts.sources.nccl import NcclSource
from asyncep_sgl.experts.sources.peer_source import PeerSource
from asyncep_sgl.experts.sources.pinned import PinnedSource
from asyncep_sgl.experts.sources.remote import RemoteReader

Truth = Callable[[int, str, int], torch.Tensor]
# One batch: how many of its layers are waited for, and whether the last of these is left without a release.
Batch = tuple[int, bool]


@dataclass
class Side:
    """One rank: what it gathers, from where, and the device that checks the order of its reads, if there is one."""

    layers: list[GatheredLayer]
    source: LayerSource
    device: FakeDevice | None = None

    def read(self, memory: torch.Tensor) -> None:
        """The forward pass reads."""
        if self.device is not None:
            self.device.touch(self.device.current_stream(), memory, write=False, what="the layer reads")


@dataclass
class World:
    """A source in surroundings of its own.

    Attributes:
        truth: what an expert's tensor is, by layer, name and expert.
        sides: makes the ranks anew; all of them gather at once.
        lacking: makes a rank of whose missing experts one is nowhere to be had; None where such a one is waited for.
    """

    truth: Truth
    sides: Callable[[], list[Side]]
    lacking: Callable[[], Side] | None = None
    close: Callable[[], None] = lambda: None


def in_files(folder: Path, *, free: int) -> World:
    written = test_on_disk.write_checkpoint(folder, torch.float32)
    paths = sorted(folder.glob("*.safetensors"))
    missing = frozenset({1, 2, 4})

    def layers(wanted: frozenset[int] = missing) -> list[GatheredLayer]:
        made = test_on_disk.layers(wanted, torch.float32)
        for entry in made:
            for name, parameter in entry.parameters.items():
                for expert in set(range(test_on_disk.EXPERTS)) - wanted:
                    parameter[expert] = written[entry.layer, expert][name]
        return made

    return World(
        lambda layer, name, expert: written[layer, expert][name],
        lambda: [Side(layers(), FileSource(paths, "float32", lambda: free))],
        lambda: Side(layers(), FileSource(paths[:1], "float32", lambda: free)),
    )


def cached_files(folder: Path) -> World:
    return in_files(folder, free=1 << 40)


def direct_files(folder: Path) -> World:
    return in_files(folder, free=0)


def other_hosts(folder: Path) -> World:
    group = test_peer_source.Group(copies=1)
    views: list[ViewClient] = []

    def side() -> Side:
        views.append(ViewClient(group.hosts[0].group.exporter_address))
        reader = RemoteReader(f"conformance-{os.getpid()}-{len(views)}")
        source = PeerSource(reader, views[-1], node=0, nodes=test_peer_source.NODES, verify=True)
        return Side(list(group.gather.layers.values()), source)

    def close() -> None:
        for view in views:
            view.close()
        group.close()

    return World(
        lambda layer, name, expert: test_peer_source.weights(layer, expert)[name], lambda: [side()], close=close
    )


def peers_memory(folder: Path) -> World:
    model = Model(7, 4, 3, rank=1)

    def side(shards: dict[tuple[int, int, str], Shard]) -> Side:
        device = FakeDevice()
        source = CudaSource(device, shards, rank=1, ranks=3, lanes=2, slice_bytes=40)
        return Side(model.gathered(), source, device)

    found = model.shards()
    without = {key: shard for key, shard in found.items() if key[0] != 2}
    return World(truth_of(model), lambda: [side(found)], lambda: side(without))


def host_memory(folder: Path) -> World:
    model = Model(5, 4, 1, rank=0)

    def side() -> Side:
        device = FakeDevice()
        source = PinnedSource(device, lambda layer, name: model.tensors[layer, name])
        return Side(model.gathered(everything=True), source, device)

    return World(truth_of(model), lambda: [side()])


def collective(folder: Path) -> World:
    from torch.distributed import HashStore, ProcessGroupGloo

    ranks = 3
    models = [Model(7, 3, ranks, rank) for rank in range(ranks)]
    owned = {
        layer: {
            rank: range(min(held), max(held) + 1)
            for rank in range(ranks)
            if (held := models[0].layout.held(layer, rank))
        }
        for layer in range(3)
    }

    def side(rank: int, group: ProcessGroupGloo, owned: dict[int, dict[int, range]] = owned) -> Side:
        own = {
            (layer, name): Shard(run, tensor[run.start : run.stop].view(-1).view(torch.uint8))
            for (layer, name), tensor in models[rank].tensors.items()
            for run in [owned[layer][rank]]
        }
        device = FakeDevice()
        return Side(models[rank].gathered(), NcclSource(device, group, owned, own), device)

    def together() -> list[Side]:
        store = HashStore()
        with ThreadPoolExecutor(ranks) as pool:
            groups = pool.map(lambda rank: ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60)), range(ranks))
            return [side(rank, group) for rank, group in enumerate(groups)]

    def lacking() -> Side:
        fewer = {layer: {rank: run for rank, run in runs.items() if rank != 2} for layer, runs in owned.items()}
        return side(0, ProcessGroupGloo(HashStore(), 0, 1, timedelta(seconds=60)), fewer)

    return World(truth_of(models[0]), together, lacking)


def truth_of(model: Model) -> Truth:
    return lambda layer, name, expert: model.tensors[layer, name][expert]


SOURCES = (cached_files, direct_files, other_hosts, peers_memory, host_memory, collective)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda maker: maker.__name__)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        # Within one machine UCX would read the other process's memory; the network is what is meant here.
        patch.setenv("UCX_TLS", "tcp")
        patch.setenv("UCX_NET_DEVICES", "lo")
        made = request.param(tmp_path_factory.mktemp("source"))
        yield made
        made.close()


def on_all(sides: list[Side], depth: int, run: Callable[[Side, ExpertGather], None]) -> None:
    """Runs the same on every rank, all at once, as a collective needs it."""

    def one(side: Side) -> None:
        gather = ExpertGather(side.layers, side.source, depth)
        run(side, gather)
        gather.pipeline.close()

    with ThreadPoolExecutor(len(sides)) as pool:
        list(pool.map(one, sides))


def compute(side: Side, gather: ExpertGather, layer: int, truth: Truth) -> None:
    """One layer: all its experts are there, those of the rank itself too, bit for bit."""
    table = gather.wait(layer)
    for name, experts in (("w13_weight", table.w13), ("w2_weight", table.w2)):
        for expert, tensor in enumerate(experts):
            side.read(tensor)
            assert torch.equal(tensor, truth(layer, name, expert)), f"layer {layer}, {name}, expert {expert}"


def history(seed: int, layers: int) -> list[Batch]:
    numbers = random.Random(seed)
    return [(numbers.randrange(layers + 1), numbers.random() < 0.3) for _ in range(5)] + [(layers, False)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_layer_is_whole_whatever_was_given_up_before(world: World, depth: int) -> None:
    def run(side: Side, gather: ExpertGather) -> None:
        layers = list(gather.layers)
        for computed, left in history(depth, len(layers)):
            gather.begin()
            for position, layer in enumerate(layers[:computed]):
                compute(side, gather, layer, world.truth)
                if left and position == computed - 1:
                    break
                gather.release(layer)

    on_all(world.sides(), depth, run)


def test_a_slot_may_be_given_up_and_filled_anew(world: World) -> None:
    def run(side: Side, gather: ExpertGather) -> None:
        first, second = list(gather.layers)[:2]
        for _ in range(2):
            side.source.start(first, 0).cancel()
            side.source.start(second, 0).wait()
        gather.begin()
        for layer in gather.layers:
            compute(side, gather, layer, world.truth)
            gather.release(layer)

    on_all(world.sides(), 2, run)


def test_gathers_are_timed_and_what_was_measured_does_not_stay(world: World) -> None:
    def run(side: Side, gather: ExpertGather) -> None:
        assert all(seconds >= 0 for seconds in gather.measure())
        gather.begin()
        for layer in gather.layers:
            compute(side, gather, layer, world.truth)
            gather.release(layer)
        trace = gather.take_trace()
        assert [entry.layer for entry in trace] == list(gather.layers)
        assert all(entry.exposed >= 0 for entry in trace)
        assert all(entry.gather is not None and entry.gather.seconds >= 0 for entry in trace)
        assert gather.counters == side.source.counters

    on_all(world.sides(), 2, run)


# Host memory has every expert, and another host's is waited for (`test_peer_source.py`).
@pytest.mark.parametrize("maker", [cached_files, direct_files, peers_memory, collective])
def test_an_expert_that_is_nowhere_is_said_before_anything_is_gathered(
    maker: Callable[[Path], World], tmp_path: Path
) -> None:
    world = maker(tmp_path)
    assert world.lacking is not None
    side = world.lacking()
    with pytest.raises((GatherError, StoreError)):
        ExpertGather(side.layers, side.source, 2)
