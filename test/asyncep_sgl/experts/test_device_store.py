"""The experts in devices' memory: who keeps what, what outlives whom, and that every rank reads every expert."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_cuda import FakeDevice
from host_vmm import HostMemory

from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.shard.manager import ExpertManager
from asyncep_sgl.experts.sources.device_managers import DeviceExpertManager, PinnedExpertManager
from asyncep_sgl.experts.start import start_gather
from asyncep_sgl.experts.store.handles import HandleClient
from asyncep_sgl.experts.store.server import StoreServer

LAYERS, EXPERTS, RANKS = 3, 7, 3
SHAPES = {"w13_weight": (48, 40), "w2_weight": (40, 24)}


joined: list[ExpertManager] = []


def weight(layer: int, expert: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(layer * 1000 + expert * 10 + len(name))
    return torch.randn(SHAPES[name], generator=generator).bfloat16()


def load(manager: ExpertManager) -> None:
    """What SGLang does: parameters made, adopted, and of the owned experts written."""
    for layer in range(LAYERS):
        made = {
            name: torch.nn.Parameter(torch.empty(EXPERTS, *shape, dtype=torch.bfloat16), requires_grad=False)
            for name, shape in SHAPES.items()
        }
        manager.adopt(layer, EXPERTS, made)
        if not manager.shard_present:
            for name, parameter in made.items():
                for expert in manager.owned(layer):
                    parameter.data[expert] = weight(layer, expert, name)
    manager.finish()


def device_manager(address: str, rank: int, **group: int) -> DeviceExpertManager:
    settings = GroupConfig(devices=RANKS, depth=2, lanes=2, **group)  # type: ignore[arg-type]
    manager = DeviceExpertManager.join(rank, RANKS, address, settings)
    assert isinstance(manager, DeviceExpertManager)
    manager.memory_of = lambda _: HostMemory()
    joined.append(manager)
    return manager


def pinned_manager(address: str, rank: int, group: GroupConfig) -> PinnedExpertManager:
    manager = PinnedExpertManager.join(rank, RANKS, address, group)
    assert isinstance(manager, PinnedExpertManager)
    joined.append(manager)
    return manager


def check_every_expert(manager: ExpertManager) -> FakeDevice:
    device = FakeDevice()
    started = start_gather(
        manager, manager.group, "no folder", LAYERS, False, device=torch.device("cpu"), device_of=lambda _: device
    )
    assert started is not None
    gather, book = started
    assert book.seconds > 0
    for _ in range(2):
        gather.begin()
        for layer in gather.layers:
            table = gather.wait(layer)
            for name, side in (("w13_weight", table.w13), ("w2_weight", table.w2)):
                for expert in range(EXPERTS):
                    device.touch(device.current_stream(), side[expert], write=False, what="the layer reads")
                    assert torch.equal(side[expert], weight(layer, expert, name)), f"{layer} {expert} {name}"
            gather.release(layer)
    return device


@pytest.fixture
def store() -> Iterator[StoreServer]:
    store = StoreServer(RANKS, devices=True)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            select.select([store.descriptor], [], [], 0.02)
            store.serve_pending()

    thread = threading.Thread(target=serve)
    thread.start()
    yield store
    while joined:
        joined.pop().client.close()
    ended.set()
    thread.join()
    store.close()


@pytest.mark.parametrize("resident", [0, 1])
def test_every_rank_reads_every_expert_and_keeps_only_its_own(store: StoreServer, resident: int) -> None:
    managers = [device_manager(store.address, rank, resident_layers=resident) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(load, managers))
    for manager in managers:
        check_every_expert(manager)
    stride = sum(torch.empty(shape).numel() * 2 for shape in SHAPES.values())
    assert store.registry.status().expert_bytes == EXPERTS * stride * (LAYERS - resident + resident * RANKS)


_RANK = """
import sys
from test_device_store import device_manager, load
manager = device_manager(sys.argv[1], 0)
load(manager)
print("loaded", flush=True)
sys.stdin.read()
"""


def test_experts_outlive_their_rank_and_it_finds_them_again(store: StoreServer) -> None:
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    first = subprocess.Popen(
        [sys.executable, "-c", _RANK, store.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    others = [device_manager(store.address, rank) for rank in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(load, others))
    assert first.stdout is not None
    assert first.stdout.readline() == b"loaded\n"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    check_every_expert(others[0])  # maps the dead rank's experts
    again = device_manager(store.address, 0)
    assert again.shard_present
    load(again)
    check_every_expert(again)
    assert store.registry.status().ranks[0].restarts == 1


def test_a_rank_that_died_while_loading_starts_over(store: StoreServer) -> None:
    half = device_manager(store.address, 0)
    parameter = torch.nn.Parameter(torch.empty(EXPERTS, 48, 40, dtype=torch.bfloat16), requires_grad=False)
    half.adopt(0, EXPERTS, {"w13_weight": parameter})
    managers = [device_manager(store.address, rank) for rank in range(RANKS)]
    assert not managers[0].shard_present
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(load, managers))
    check_every_expert(managers[1])


def test_host_memory_serves_devices_and_the_first_layers_stay(store: StoreServer) -> None:
    each = sum(torch.empty(shape).numel() * 2 * EXPERTS for shape in SHAPES.values())
    group = GroupConfig(memory_limit=each + 1, depth=3)
    managers = [pinned_manager(store.address, rank, group) for rank in range(RANKS)]
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(load, managers))
    for manager in managers:
        assert list(manager.layouts) == [1, 2]
        assert manager.owned(0) == frozenset(range(EXPERTS))
        device = check_every_expert(manager)
        assert len(device.pinned) == 4
    assert store.registry.status().expert_bytes == 2 * each
    # A rank that starts again reads what was on its device alone, and nothing else.
    again = pinned_manager(store.address, 0, group)
    load(again)
    wanted = again.weights().owned
    assert wanted(0) == frozenset(range(EXPERTS))
    assert wanted(1) == frozenset()


def test_no_memory_and_no_keeper_say_what_to_do(store: StoreServer) -> None:
    manager = device_manager(store.address, 0)
    manager.memory_of = lambda _: HostMemory(limit=100)
    with pytest.raises(StoreError, match="the device gave no"):
        load(manager)
    with pytest.raises(StoreError, match="does not keep device memory"):
        HandleClient("ipc://@asyncep-nobody").withdraw("0/0/w")
    client = HandleClient(store.address)
    assert client.withdraw("0/0/no-such") is None
