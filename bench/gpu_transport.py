"""The transports between processes on this machine's GPUs: bytes, order, and what a dead rank leaves. For `gpu_check`.

Started with arguments it is one rank of such a check. In a rehearsal streams and device memory are those of
`emulation/fake_cuda.py` and `emulation/host_vmm.py`, and Gloo stands in for NCCL; processes and descriptors are real.
"""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "emulation"))

import torch
from fake_cuda import FakeDevice
from host_vmm import HostMemory

from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.experts.gather.device import TorchDevice
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, slot_layout
from asyncep_sgl.experts.shard.manager import ExpertManager
from asyncep_sgl.experts.sources.cuda import CudaSource, Shard
from asyncep_sgl.experts.sources.device_managers import DeviceExpertManager, PinnedExpertManager
from asyncep_sgl.experts.sources.device_memory import CudaMemory
from asyncep_sgl.experts.sources.nccl import NcclSource
from asyncep_sgl.experts.sources.pinned import PinnedSource
from asyncep_sgl.experts.store.server import StoreServer

LAYERS, BATCHES = 4, 4
RANKS = 2


@dataclass(frozen=True)
class Kit:
    """The real things, or their stand-ins. ``index``: the GPU."""

    rehearsal: bool
    index: int = 0

    @property
    def where(self) -> torch.device:
        return torch.device("cpu") if self.rehearsal else torch.device("cuda", self.index)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, hidden size and expert width: of Qwen3-30B-A3B."""
        return (7, 40, 24) if self.rehearsal else (128, 2048, 768)

    def device(self) -> Any:
        return FakeDevice() if self.rehearsal else TorchDevice(self.index)

    def memory(self) -> Any:
        return HostMemory() if self.rehearsal else CudaMemory(self.index)

    def weight(self, layer: int, expert: int, name: str) -> torch.Tensor:
        """Any process makes the same: a pattern of the layer, the expert and the place."""
        _, hidden, inter = self.shape
        shape = (2 * inter, hidden) if name == "w13_weight" else (hidden, inter)
        ramp = torch.arange(shape[0] * shape[1], device=self.where, dtype=torch.int32)
        bits = (ramp * 31 + layer * 1009 + expert * 97 + len(name)) % 32749
        return bits.to(torch.int16).view(torch.bfloat16).view(shape)

    def load(self, manager: ExpertManager) -> None:
        """As SGLang does: parameters made, adopted, what is owned written, the rest waited for."""
        experts, hidden, inter = self.shape
        for layer in range(LAYERS):
            made = {
                name: torch.nn.Parameter(torch.empty(experts, *shape, dtype=torch.bfloat16, device=self.where), False)
                for name, shape in (("w13_weight", (2 * inter, hidden)), ("w2_weight", (hidden, inter)))
            }
            manager.adopt(layer, experts, made)
            if not manager.shard_present:
                for name, parameter in made.items():
                    for expert in manager.owned(layer):
                        parameter.data[expert].copy_(self.weight(layer, expert, name))
        if not self.rehearsal:
            torch.cuda.synchronize(self.where)
        manager.finish()


@contextlib.contextmanager
def served_store(ranks: int) -> Iterator[StoreServer]:
    """A launcher's store with descriptors, served by a thread."""
    store = StoreServer(ranks, devices=True)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            select.select([store.descriptor], [], [], 0.02)
            store.serve_pending()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield store
    finally:
        ended.set()
        thread.join()
        store.close()


@contextlib.contextmanager
def child_rank(kit: Kit, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process; ends with the block."""
    command = [sys.executable, __file__, str(int(kit.rehearsal)), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def joined(kit: Kit, kind: type[ExpertManager], address: str, rank: int, ranks: int) -> ExpertManager:
    """A rank's side of the store."""
    group = GroupConfig(devices=ranks, memory_limit=0 if kind is PinnedExpertManager else None)
    manager = kind.join(rank, ranks, address, group)
    if isinstance(manager, DeviceExpertManager):
        manager.memory_of = lambda _: kit.memory()
    return manager


def layers_of(manager: ExpertManager) -> list[GatheredLayer]:
    found = []
    for layer in range(LAYERS):
        parameters = {name: parameter.data for name, parameter in manager.parameters(layer).items()}
        found.append(GatheredLayer(layer, parameters, slot_layout(parameters, manager.missing(layer))))
    return found


def pass_over(kit: Kit, device: Any, gather: ExpertGather) -> str:
    """Batches queued one behind the other without the host waiting; every layer's experts are copied out by the
    forward pass's stream as it reads them, and compared in the end.

    Raises:
        AssertionError: an expert was not the one that belongs there.
    """
    read: list[tuple[int, str, list[torch.Tensor]]] = []
    for batch in range(BATCHES):
        gather.begin()
        for layer in gather.layers:
            table = gather.wait(layer)
            for name, side in (("w13_weight", table.w13), ("w2_weight", table.w2)):
                if kit.rehearsal:
                    for entry in side:
                        device.touch(device.current_stream(), entry, write=False, what="the layer reads")
                # All of the first and last batch; of those between, what is cheap to keep.
                kept = side if batch in (0, BATCHES - 1) else side[:1]
                read.append((layer, name, [entry.clone() for entry in kept]))
            gather.release(layer)
    if not kit.rehearsal:
        torch.cuda.synchronize(kit.where)
    for layer, name, entries in read:
        for expert, entry in enumerate(entries):
            if not torch.equal(
                entry.to(kit.where).view(torch.int16), kit.weight(layer, expert, name).view(torch.int16)
            ):
                raise AssertionError(f"layer {layer}, expert {expert}, {name}: not what its owner wrote")
    trace = gather.take_trace()
    nbytes = max(entry.slot.nbytes for entry in gather.layers.values())
    rate = nbytes / min(gather.measure()) / 1e9
    exposed = sum(entry.exposed for entry in trace) * 1e3
    said = f"{LAYERS} layers x {BATCHES} batches whole; {nbytes / 1e6:.1f} MB a layer, {rate:.1f} GB/s"
    return f"{said}, {exposed:.1f} ms exposed"


def check_outliving(kit: Kit) -> str:
    """A rank is killed; its experts are mapped by another process, and by itself when it comes back."""
    with served_store(1) as store:
        with child_rank(kit, "load", store.address, "0", "1") as child:
            _expect(child, "loaded")
        again = joined(kit, DeviceExpertManager, store.address, 0, 1)
        try:
            if not again.shard_present:
                raise AssertionError("the store does not know the shard any more")
            kit.load(again)
            for layer in range(LAYERS):
                for name, parameter in again.parameters(layer).items():
                    for expert in range(kit.shape[0]):
                        found, wanted = parameter.data[expert], kit.weight(layer, expert, name)
                        if not torch.equal(found.view(torch.int16), wanted.view(torch.int16)):
                            raise AssertionError(f"layer {layer}, expert {expert}, {name} was lost")
        finally:
            again.client.close()
    return f"{LAYERS} layers found again, nothing read twice"


def check_peers(kit: Kit) -> str:
    """Two processes with a part of the experts each: this one gathers the other's."""
    with served_store(RANKS) as store, child_rank(kit, "load", store.address, "1", str(RANKS)) as child:
        manager = joined(kit, DeviceExpertManager, store.address, 0, RANKS)
        try:
            kit.load(manager)
            _expect(child, "loaded")
            device = kit.device()
            source = CudaSource(device, manager.shards(), rank=0, ranks=RANKS, lanes=2)  # type: ignore[attr-defined]
            said = pass_over(kit, device, ExpertGather(layers_of(manager), source, 2, kit.where))
            source.close()
        finally:
            manager.client.close()
    return said


def check_pinned(kit: Kit) -> str:
    """Everything in host memory, four slots."""
    with served_store(1) as store:
        manager = joined(kit, PinnedExpertManager, store.address, 0, 1)
        try:
            kit.load(manager)
            device = kit.device()
            source = PinnedSource(device, lambda layer, name: manager.parameters(layer)[name].data)
            said = pass_over(kit, device, ExpertGather(layers_of(manager), source, 4, kit.where))
            source.close()
        finally:
            manager.client.close()
    return said


def check_collective(kit: Kit) -> str:
    """Two ranks, each on a GPU of its own, gather together."""
    with tempfile.TemporaryDirectory() as folder, child_rank(kit, "collective", f"{folder}/group") as child:
        said = _collective(kit, 0, f"{folder}/group")
        _expect(child, "whole")
    return said


def _collective(kit: Kit, rank: int, file: str) -> str:
    import torch.distributed as dist

    store = dist.FileStore(file, RANKS)
    limit = timedelta(seconds=60)
    group: Any
    if kit.rehearsal:
        group = dist.ProcessGroupGloo(store, rank, RANKS, limit)
    else:
        torch.cuda.set_device(kit.where)
        group = dist.ProcessGroupNCCL(store, rank, RANKS, limit)
    with served_store(1) as stored:
        # One rank's store on its own: every expert is there, the shard is cut out of it.
        manager = joined(kit, DeviceExpertManager, stored.address, 0, 1)
        try:
            kit.load(manager)
            half = kit.shape[0] // RANKS
            owned = {0: range(half), 1: range(half, kit.shape[0])}
            layers, own = [], {}
            for layer in range(LAYERS):
                parameters = {name: parameter.data for name, parameter in manager.parameters(layer).items()}
                missing = frozenset(owned[1 - rank])
                layers.append(GatheredLayer(layer, parameters, slot_layout(parameters, missing)))
                for name, parameter in parameters.items():
                    mine = parameter[owned[rank].start : owned[rank].stop]
                    own[layer, name] = Shard(owned[rank], mine.view(-1).view(torch.uint8))
            device = kit.device()
            source = NcclSource(device, group, dict.fromkeys(range(LAYERS), owned), own)
            return pass_over(kit, device, ExpertGather(layers, source, 2, kit.where))
        finally:
            manager.client.close()


def _expect(child: subprocess.Popen[str], word: str) -> None:
    if child.stdout is None or child.stdout.readline().strip() != word:
        raise AssertionError(f"the other process ended before it said {word!r}; its traceback stands above")


def main() -> None:
    rehearsal, what, *arguments = sys.argv[1:]
    kit = Kit(bool(int(rehearsal)))
    if what == "load":
        address, rank, ranks = arguments
        manager = joined(kit, DeviceExpertManager, address, int(rank), int(ranks))
        kit.load(manager)
        print("loaded", flush=True)
    else:
        _collective(Kit(kit.rehearsal, 1), 1, arguments[0])
        print("whole", flush=True)
    # The parent ends this process; until then its memory is mapped.
    sys.stdin.read()


if __name__ == "__main__":
    main()
