"""The collective gather between real processes, over Gloo in NCCL's place: the same source, the same calls."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeDevice
from test_device_gather import Model, compute

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.gather import ExpertGather
from asyncep_sgl.experts.sources.cuda import Shard
from asyncep_sgl.experts.sources.nccl import NcclSource

RANKS = 3


def run_rank(rank: int, file: str, *, dies: bool) -> None:
    from torch.distributed import FileStore, ProcessGroupGloo

    model = Model(7, 3, RANKS, rank)
    group = ProcessGroupGloo(FileStore(file, RANKS), rank, RANKS, timedelta(seconds=20))
    owned = {
        layer: {r: range(min(held), max(held) + 1) for r in range(RANKS) if (held := model.layout.held(layer, r))}
        for layer in range(3)
    }
    own = {
        (layer, name): Shard(owned[layer][rank], tensor[owned[layer][rank].start : owned[layer][rank].stop].view(-1)
                             .view(torch.uint8))
        for (layer, name), tensor in model.tensors.items()
    }  # fmt: skip
    device = FakeDevice()
    gather = ExpertGather(model.gathered(), NcclSource(device, group, owned, own), 2)
    for batch in range(2):
        if dies and batch and rank == 2:
            os._exit(0)
        gather.begin()
        for layer in range(3):
            compute(device, gather, model, layer)
            gather.release(layer)
    assert device.synchronized == 0
    print("whole", flush=True)


@pytest.mark.parametrize("dies", [False, True])
def test_ranks_gather_together_and_fall_together(dies: bool, tmp_path: Path) -> None:
    code = f"from test_collective import run_rank; import sys; run_rank(int(sys.argv[1]), {str(tmp_path / 'store')!r}, "
    code += f"dies={dies})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         env=environment, text=True)
        for rank in range(RANKS)
    ]  # fmt: skip
    ends = [rank.communicate(timeout=120) for rank in ranks]
    if dies:
        # What the peers' own transport does not do: one rank's end is everybody's.
        assert all(out == "" and rank.returncode for rank, (out, _) in zip(ranks[:2], ends, strict=False)), ends
        assert any("GatherError: the collective from rank" in error for _, error in ends), ends
    else:
        assert [out for out, _ in ends] == ["whole\n"] * RANKS, ends


def test_ranks_that_own_less_than_everything_are_refused() -> None:
    class Group:
        def rank(self) -> int:
            return 0

    model = Model(4, 1, 2, rank=0)
    with pytest.raises(GatherError, match=r"layer 0: the other ranks own \[\]"):
        ExpertGather(model.gathered(), NcclSource(FakeDevice(), Group(), {0: {0: range(2)}}, {}), 1)
