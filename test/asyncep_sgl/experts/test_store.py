"""The expert store in real processes: several ranks, one copy, read-only once complete, gone with its owner."""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import shared_memory
import torch
from safetensors.torch import save_file

from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.group.view import ViewClient
from asyncep_sgl.experts.shard.checkpoint import OwnedWeights
from asyncep_sgl.experts.shard.manager import ExpertManager
from asyncep_sgl.experts.store.client import StoreClient
from asyncep_sgl.experts.store.messages import (
    Allocate,
    Failed,
    Hello,
    HelpReport,
    Loaded,
    Segment,
    Status,
    StatusRequest,
    TensorSpec,
    Welcome,
)
from asyncep_sgl.experts.store.registry import StoreRegistry
from asyncep_sgl.experts.store.server import StoreServer
from asyncep_sgl.process.segment import OwnedSegment, map_segment

LAYERS, EXPERTS, ROWS, COLUMNS = 3, 5, 64, 96


class RunningStore:
    """A store served by a thread, as the launcher's loop serves it."""

    def __init__(self, ranks: int, limit: int | None = None) -> None:
        self.server = StoreServer(ranks, limit)
        self.address = self.server.address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            select.select([self.server.descriptor], [], [], 0.02)
            self.server.serve_pending()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.server.close()


@pytest.fixture
def store() -> Iterator[RunningStore]:
    running = RunningStore(2)
    yield running
    running.close()


def value(layer: int, expert: int) -> float:
    return float(layer * 100 + expert + 1)


def rank_process(rank: int, address: str, results: multiprocessing.Queue[tuple[int, str]]) -> None:
    manager = ExpertManager.join(rank, 2, address)
    parameters = {}
    for layer in range(LAYERS):
        parameter = torch.nn.Parameter(torch.empty(EXPERTS, ROWS, COLUMNS), requires_grad=False)
        manager.adopt(layer, EXPERTS, {"w": parameter})
        parameters[layer] = parameter
        for expert in manager.owned(layer):
            parameter.data[expert] = value(layer, expert)
    manager.finish()
    complete = all(
        bool((parameters[layer][expert] == value(layer, expert)).all())
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    )
    results.put((rank, "complete" if complete else "wrong"))


def test_ranks_see_each_others_experts_and_memory_holds_them_once(store: RunningStore) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[int, str]] = context.Queue()
    ranks = [context.Process(target=rank_process, args=(rank, store.address, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert {results.get(timeout=60) for _ in ranks} == {(0, "complete"), (1, "complete")}
    for process in ranks:
        process.join(30)
    status = StoreClient(store.address).ask(StatusRequest(), Status)
    assert status.expert_bytes == LAYERS * EXPERTS * ROWS * COLUMNS * 4
    assert 0 <= status.resident_bytes - status.expert_bytes < status.tensors * status.page_bytes
    assert sum(rank.experts for rank in status.ranks) == LAYERS * EXPERTS
    # The ranks are gone; what they loaded is not.
    again = StoreClient(store.address).ask(Hello("rank", os.getpid(), 1), Welcome)
    assert again.shard_present


def test_a_write_to_complete_experts_faults_instead_of_changing_them(store: RunningStore) -> None:
    script = """
import sys, torch
from asyncep_sgl.experts.store.client import StoreClient
from asyncep_sgl.experts.store.messages import Loaded, Done
from asyncep_sgl.experts.shard.manager import ExpertManager
import threading
def other():
    manager = ExpertManager.join(1, 2, sys.argv[1])
    parameter = torch.nn.Parameter(torch.empty(4, 8), requires_grad=False)
    manager.adopt(0, 4, {"w": parameter}); manager.finish()
thread = threading.Thread(target=other); thread.start()
manager = ExpertManager.join(0, 2, sys.argv[1])
parameter = torch.nn.Parameter(torch.empty(4, 8), requires_grad=False)
manager.adopt(0, 4, {"w": parameter})
parameter.data[0] = 7.0
manager.finish(); thread.join()
print("sealed", float(parameter[0, 0]), flush=True)
parameter.data[0] = 8.0
print("written", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script, store.address], capture_output=True, text=True, timeout=120)
    assert "sealed 7.0" in done.stdout, done.stderr
    assert "written" not in done.stdout
    assert done.returncode == -signal.SIGSEGV


def test_ranks_that_disagree_on_a_shape_are_told(store: RunningStore) -> None:
    client = StoreClient(store.address)
    client.ask(Allocate(TensorSpec(0, "w", (4, 8), "float32", 128), ((0, 4),)), Segment)
    with pytest.raises(StoreError, match="disagree on w of layer 0"):
        client.ask(Allocate(TensorSpec(0, "w", (4, 9), "float32", 144), ((0, 4),)), Segment)


def test_lack_of_memory_names_the_flag_and_the_fix() -> None:
    running = RunningStore(1, limit=1000)
    try:
        client = StoreClient(running.address)
        client.ask(Allocate(TensorSpec(0, "w", (4, 50), "float32", 800), ((0, 4),)), Segment)
        with pytest.raises(StoreError, match=r"--asyncep-store-limit.*raise the limit"):
            client.ask(Allocate(TensorSpec(1, "w", (4, 50), "float32", 800), ((0, 4),)), Segment)
        huge = 1 << 60
        running.server.registry.limit = None
        with pytest.raises(StoreError, match="free memory, raise the container's memory limit"):
            client.ask(Allocate(TensorSpec(1, "w", (4, 50), "float32", huge), ((0, 4),)), Segment)
    finally:
        running.close()


def test_a_rank_outside_the_group_is_refused(store: RunningStore) -> None:
    with pytest.raises(StoreError, match="rank 5 does not exist among --dp-size 2"):
        ExpertManager.join(5, 2, store.address)


def test_a_silent_store_is_an_error_not_a_hang() -> None:
    with pytest.raises(StoreError, match="is the launcher stopped"):
        StoreClient("ipc://@asyncep-nobody").ask(StatusRequest(), Status, patience=0.2)


def test_reports_wait_for_no_launcher_and_the_newest_counts() -> None:
    """One that is stopped keeps a rank from computing once, for the patience; it has the newest report soon after."""
    server = StoreServer(1)
    client = StoreClient(server.address)
    reports = [HelpReport(rank=0, blocks=number, helped=0, left=0) for number in range(4)]
    began = time.monotonic()
    assert client.tell(reports[0], patience=0.3)
    assert 0.3 <= time.monotonic() - began < 10
    began = time.monotonic()
    # With nobody to take it, patience is not asked again.
    assert not client.tell(reports[1], patience=60)
    assert not client.tell(reports[2], patience=60)
    assert time.monotonic() - began < 30
    deadline = time.monotonic() + 30
    while not client.tell(reports[3], patience=0):
        assert time.monotonic() < deadline
        server.serve_pending()
    while server.registry.status().help != (reports[3],):
        assert time.monotonic() < deadline
        server.serve_pending()
    client.close()
    server.close()


@pytest.mark.parametrize("make", [StoreClient, ViewClient, lambda _: StoreServer(1)])
def test_what_is_dropped_in_a_cycle_holds_no_thread_up(make: Callable[[str], Any], store: RunningStore) -> None:
    """The collector may meet a context before its sockets, for which it waits for ever."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            circle = [make(store.address)]
            circle.append(circle)
            del circle
        collecting = threading.Thread(target=gc.collect, daemon=True)
        collecting.start()
        collecting.join(20)
    finally:
        gc.enable()
    assert not collecting.is_alive()


def test_nonsense_on_the_socket_hurts_nobody(store: RunningStore) -> None:
    import zmq

    line = zmq.Context.instance().socket(zmq.REQ)
    line.connect(store.address)
    line.send(b"\xff\xffnonsense")
    assert b"does not understand" in line.recv()
    line.close(0)
    assert StoreClient(store.address).ask(StatusRequest(), Status).tensors == 0


def test_a_segment_has_no_name_anywhere() -> None:
    before = shared_memory.names()
    segment = OwnedSegment("test", 10_000)
    memory = map_segment(segment.path, 10_000, writable=True)
    memory[:3] = b"abc"
    assert map_segment(segment.path, 10_000, writable=False)[:3] == b"abc"
    assert not shared_memory.new_names(before)
    assert segment.resident_bytes == 3 * 4096
    segment.close()
    with pytest.raises(OSError, match=r"."):
        map_segment(segment.path, 10_000, writable=False)


def test_only_owned_experts_are_read(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.ones(4, 4)}
    prefix = "model.layers.1.mlp.experts"
    for expert in range(6):
        tensors[f"{prefix}.{expert}.up_proj.weight"] = torch.full((8,), float(expert))
    tensors["model.layers.1.mlp.shared_experts.up_proj.weight"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = OwnedWeights(lambda layer: frozenset({2, 3} if layer == 1 else ()))
    found = dict(weights.tensors([str(tmp_path / "model.safetensors")]))
    assert weights.count.read == 2 * 8 * 4
    assert weights.count.skipped == 4 * 8 * 4
    assert "model.embed_tokens.weight" in found
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in found
    assert sorted(n for n in found if ".experts." in n) == [f"{prefix}.{e}.up_proj.weight" for e in (2, 3)]


def test_only_the_pages_of_held_experts_are_made() -> None:
    page = os.sysconf("SC_PAGESIZE")
    segment = OwnedSegment("part", 100 * page, [range(3 * page, 5 * page), range(50 * page, 51 * page)])
    assert segment.resident_bytes == 3 * page
    memory = map_segment(segment.path, segment.nbytes, writable=False)
    assert memory[10 * page] == 0
    segment.close()


def test_why_a_rank_ended_is_forgotten_once_it_is_back() -> None:
    registry = StoreRegistry[str](2, lambda *_: None, lambda: 0)  # type: ignore[arg-type,return-value]
    assert registry.failure is None
    registry.handle("one", Failed(1, "no memory"))
    registry.handle("zero", Failed(0, "no memory either"))
    assert registry.failure == "rank 1: no memory"
    registry.handle("one", Loaded(1, 0, 0, 0, 0))
    assert registry.failure == "rank 0: no memory either"
    registry.handle("router", Failed(-1, "rank 0 died ten times"))
    assert registry.failure == "rank 0 died ten times"
