"""Three hosts' exporters as real processes, without SGLang: every expert arrives whole, whoever is killed meanwhile."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import pytest
import torch

from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, slot_layout
from asyncep_sgl.experts.group.view import ViewClient
from asyncep_sgl.experts.shard.manager import ExpertManager
from asyncep_sgl.experts.sources import peer_source
from asyncep_sgl.experts.sources.peer_source import PeerSource
from asyncep_sgl.experts.sources.remote import RemoteReader
from asyncep_sgl.experts.store.server import StoreServer
from asyncep_sgl.process.ports import free_port

LAYERS, EXPERTS, WIDTH, INTER, NODES = 4, 6, 32, 64, 3


def weights(layer: int, expert: int) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(layer * 100 + expert)
    return {
        "w13_weight": torch.randn(2 * INTER, WIDTH, generator=numbers),
        "w2_weight": torch.randn(WIDTH, INTER, generator=numbers),
    }


@dataclass
class Host:
    """A launcher's store, served by a thread; one rank that has loaded; the exporter's process."""

    node: int
    copies: int
    rendezvous: str
    exporter: subprocess.Popen[bytes] | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.store = StoreServer(1)
        # Daemon: where a test ends before it has closed its hosts, pytest is to end as well.
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.group = GroupConfig(
            nodes=NODES,
            node=self.node,
            copies=self.copies,
            rendezvous=self.rendezvous,
            model="m",
            exporter_address=f"{self.store.address}-exporter",
        )
        self.start_exporter()
        self.manager = ExpertManager.join(0, 1, self.store.address, self.group)
        for layer in range(LAYERS):
            parameters = {
                name: torch.nn.Parameter(torch.empty(EXPERTS, *tensor.shape), requires_grad=False)
                for name, tensor in weights(layer, 0).items()
            }
            self.manager.adopt(layer, EXPERTS, parameters)
            for expert in self.manager.owned(layer):
                for name, tensor in weights(layer, expert).items():
                    parameters[name].data[expert] = tensor
        self.manager.finish()

    def start_exporter(self) -> None:
        config = AsyncEPConfig(
            ranks=1, store_address=self.store.address, launcher_pid=os.getpid(), load_board="", group=self.group
        )
        environment = {**os.environ, **config.to_environment(), "UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
        command = [sys.executable, "-m", "asyncep_sgl.experts.group.exporter"]
        self.exporter = subprocess.Popen(command, env=environment)

    def kill_exporter(self) -> None:
        assert self.exporter is not None
        self.exporter.kill()
        self.exporter.wait()

    def close(self) -> None:
        self.kill_exporter()
        self._stop.set()
        self._thread.join()
        self.store.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            select.select([self.store.descriptor], [], [], 0.02)
            self.store.serve_pending()


class Group:
    def __init__(self, copies: int) -> None:
        rendezvous = f"127.0.0.1:{free_port()}"
        # The one that listens last of all is as good as first.
        self.hosts = {node: Host(node, copies, rendezvous) for node in (2, 1, 0)}
        manager = self.hosts[0].manager
        layers = []
        for layer in range(LAYERS):
            parameters = {name: parameter.data for name, parameter in manager.parameters(layer).items()}
            layers.append(GatheredLayer(layer, parameters, slot_layout(parameters, manager.missing(layer))))
        reader = RemoteReader(f"test-{os.getpid()}-{copies}")
        self.views = ViewClient(self.hosts[0].group.exporter_address)
        self.source = PeerSource(reader, self.views, node=0, nodes=NODES, verify=True)
        self.gather = ExpertGather(layers, self.source, depth=2)

    def batch(self) -> None:
        """One batch: every expert of every layer is what was written."""
        self.gather.begin()
        for layer in range(LAYERS):
            table = self.gather.wait(layer)
            for expert in range(EXPERTS):
                expected = weights(layer, expert)
                assert torch.equal(table.w13[expert], expected["w13_weight"]), (layer, expert)
                assert torch.equal(table.w2[expert], expected["w2_weight"]), (layer, expert)
            self.gather.release(layer)

    def close(self) -> None:
        self.gather.pipeline.close()
        self.views.close()
        for host in self.hosts.values():
            host.close()


@pytest.fixture(autouse=True)
def over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    # Within one machine UCX would read the other process's memory; the network is what is meant here.
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(request.param)
    yield made
    made.close()


@pytest.mark.parametrize("group", [1], indirect=True)
def test_what_no_host_else_has_is_waited_for(group: Group) -> None:
    for _ in range(3):
        group.batch()
    other = group.hosts[1]
    other.kill_exporter()
    starter = threading.Timer(1.0, other.start_exporter)
    starter.start()
    for _ in range(3):
        group.batch()
    starter.join()
    assert group.gather.counters.peer_losses >= 1
    assert group.gather.counters.digest_failures == 0


@pytest.mark.parametrize("group", [1], indirect=True)
def test_what_broke_and_nobody_waited_for_is_noticed_and_leaves_the_slots_free(group: Group) -> None:
    """As where rows are sent meanwhile: fetches are begun, and nobody looks at them until their slot is needed."""
    group.batch()
    gather, other = group.gather, group.hosts[1]

    def batch() -> int:
        """Layers of which something had come or was coming."""
        gather.begin()
        found = 0
        for layer in range(LAYERS):
            _, coming = gather.take(layer, patient=False)
            found += coming is not None
            gather.release(layer)
        return found

    batch()
    other.kill_exporter()
    deadline = time.monotonic() + 60
    while gather.counters.peer_losses == 0:
        assert time.monotonic() < deadline
        batch()
        time.sleep(0.01)
    other.start_exporter()
    while batch() < LAYERS:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group.batch()
    assert gather.counters.digest_failures == 0


@pytest.mark.parametrize("group", [2], indirect=True)
def test_with_two_copies_a_lost_host_is_not_waited_for(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_source, "_LOOK_SECONDS", 0.2)

    def batches_until_read_from(node: int) -> None:
        deadline = time.monotonic() + 60
        while node not in (group.source.choose(1) or {}):
            assert time.monotonic() < deadline
            group.batch()

    # With two copies a host may begin before all others are there.
    batches_until_read_from(1)
    group.hosts[1].kill_exporter()
    for _ in range(5):
        group.batch()
    assert group.gather.counters.peer_losses >= 1
    assert 1 not in (group.source.choose(1) or {})
    group.hosts[1].start_exporter()
    batches_until_read_from(1)
    assert group.gather.counters.digest_failures == 0


@pytest.mark.parametrize("group", [1], indirect=True)
def test_an_exporter_sleeps_while_nobody_reads(group: Group) -> None:
    """NIXL's own setting would poll: a core an exporter."""
    group.batch()
    for host in group.hosts.values():
        assert host.exporter is not None
        process = psutil.Process(host.exporter.pid)
        before, threads = process.cpu_times(), process.num_threads()
        threading.Event().wait(2.0)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.4, threads
