"""Experts that stay in the checkpoint and are read into slots ahead of the computation."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from server import Server, wait_measured

from asyncep_router.cost import ModelCost
from asyncep_sgl.errors import GatherError, StoreError
from asyncep_sgl.experts.gather.gather import ExpertGather, GatheredLayer, slot_layout
from asyncep_sgl.experts.shard.checkpoint_map import CheckpointMap, FileRun
from asyncep_sgl.experts.sources.file_spans import BLOCK, spans
from asyncep_sgl.experts.sources.files import FileSource

LAYERS, EXPERTS, WIDTH, INTER = 3, 5, 24, 40


def write_checkpoint(folder: Path, dtype: torch.dtype) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Two files with experts in shuffled order; returns SGLang's two tensors of each (layer, expert)."""
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    found = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            gate, up = (torch.randn(INTER, WIDTH).to(dtype) for _ in range(2))
            down = torch.randn(WIDTH, INTER).to(dtype)
            found[layer, expert] = {"w13_weight": torch.cat([gate, up]), "w2_weight": down}
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            for name, tensor in (("up_proj", up), ("down_proj", down), ("gate_proj", gate)):
                files[(layer + expert) % 2][f"{prefix}.{name}.weight"] = tensor.contiguous()
            files[0][f"model.layers.{layer}.mlp.gate.weight"] = torch.ones(EXPERTS, WIDTH)
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{number}.safetensors")
    return found


def layers(missing: frozenset[int], dtype: torch.dtype) -> list[GatheredLayer]:
    found = []
    for layer in range(LAYERS):
        parameters = {
            "w13_weight": torch.zeros(EXPERTS, 2 * INTER, WIDTH, dtype=dtype),
            "w2_weight": torch.zeros(EXPERTS, WIDTH, INTER, dtype=dtype),
        }
        found.append(GatheredLayer(layer, parameters, slot_layout(parameters, missing)))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_slots_hold_what_the_files_hold(tmp_path: Path, dtype: torch.dtype, depth: int, free: int) -> None:
    """With ``free`` 0 past the page cache."""
    written = write_checkpoint(tmp_path, dtype)
    missing = frozenset({1, 2, 4})
    source = FileSource(sorted(tmp_path.glob("*.safetensors")), str(dtype).removeprefix("torch."), lambda: free)
    gather = ExpertGather(layers(missing, dtype), source, depth)
    for _ in range(3):
        gather.begin()
        for layer in range(LAYERS):
            table = gather.wait(layer)
            for expert in missing:
                assert torch.equal(table.w13[expert], written[layer, expert]["w13_weight"])
                assert torch.equal(table.w2[expert], written[layer, expert]["w2_weight"])
            assert not table.w13[0].any()  # not missing: the store's own
            gather.release(layer)
    gather.pipeline.close()


def test_the_map_finds_every_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, torch.float32)
    paths = sorted(tmp_path.glob("*.safetensors"))
    found = CheckpointMap.of(paths)
    assert found.dtype == "float32"
    for path in paths:
        raw = path.read_bytes()
        with safe_open(path, framework="pt") as reader:
            for (layer, name, expert), runs in found.runs.items():
                parts = ("gate_proj", "up_proj") if name == "w13_weight" else ("down_proj",)
                for part, run in zip(parts, runs, strict=True):
                    if run.file != str(path):
                        continue
                    tensor = reader.get_tensor(f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight")
                    assert raw[run.offset : run.offset + run.nbytes] == tensor.numpy().tobytes()


def test_what_cannot_be_read_in_place_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, torch.float32)
    paths = sorted(tmp_path.glob("*.safetensors"))
    with pytest.raises(StoreError, match="use --dtype float32"):
        FileSource(paths, "bfloat16")
    source = FileSource(paths[:1], "float32")
    with pytest.raises(StoreError, match="has 0 bytes in the checkpoint"):
        ExpertGather(layers(frozenset(range(EXPERTS)), torch.float32), source, 2)


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_a_file_that_has_shrunk_is_an_error_not_old_bytes(tmp_path: Path, free: int) -> None:
    write_checkpoint(tmp_path, torch.float32)
    paths = sorted(tmp_path.glob("*.safetensors"))
    source = FileSource(paths, "float32", lambda: free)
    gather = ExpertGather(layers(frozenset({0, 3}), torch.float32), source, 2)
    for path in paths:
        with path.open("r+b") as file:
            file.truncate(2000)
    gather.begin()
    with pytest.raises(GatherError, match="was it changed"):
        gather.wait(0)
    gather.pipeline.close()


@given(data=st.data(), blocks=st.integers(2, 5))
def test_spans_read_every_byte_once_in_whole_blocks(data: st.DataObject, blocks: int) -> None:
    """Runs anywhere in two files of recognisable bytes, read by spans into a slot."""
    size = 12 * BLOCK + 700
    files = {name: random.Random(name).randbytes(size) for name in ("a", "b")}
    cuts = st.lists(st.integers(0, size), min_size=2, max_size=12, unique=True).map(sorted)
    runs = []
    for name in files:
        found = data.draw(cuts)
        runs += [FileRun(name, low, high - low) for low, high in itertools.pairwise(found) if data.draw(st.booleans())]
    data.draw(st.randoms(use_true_random=False)).shuffle(runs)
    targets = [*itertools.accumulate((run.nbytes for run in runs), initial=0)]
    slot, touched = bytearray(targets[-1]), bytearray(targets[-1])
    planned = spans(zip(runs, targets, strict=False), blocks * BLOCK)
    for span in planned:
        assert span.offset % BLOCK == span.nbytes % BLOCK == 0 < span.nbytes <= blocks * BLOCK
        read = files[span.file][span.offset : span.offset + span.nbytes]
        assert span.needed <= len(read)
        for part in span.parts:
            slot[part.target : part.target + part.nbytes] = read[part.source : part.source + part.nbytes]
            for byte in range(part.target, part.target + part.nbytes):
                touched[byte] += 1
    assert all(count == 1 for count in touched)
    assert slot == b"".join(files[run.file][run.offset : run.offset + run.nbytes] for run in runs)
    # What lies beside is read for nothing: at most a block at each end of a run.
    assert sum(span.nbytes for span in planned) <= len(slot) + 2 * BLOCK * (len(runs) + len(planned))


def in_float32(model: Path, folder: Path) -> Path:
    """A copy of a checkpoint whose sums differ by rounding far below what a wrong piece would change."""
    shutil.copytree(model, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.server
def test_long_prompts_are_cut_and_answered_whatever_comes_with_them(
    tmp_path: Path, tiny_model: Callable[[str], Path], serve: Callable[..., Server]
) -> None:
    """Prompts of several T each, several at once: pieces of one and beginnings of others meet in the scheduler."""
    numbers = random.Random(2)
    prompts = [[numbers.randrange(3, 512) for _ in range(length)] for length in (300, 900, 500, 700, 60, 100, 800, 30)]
    flags = ["--asyncep-expert-memory", "100KB", "--asyncep-threshold-tokens", "64", "--asyncep-log-gathers"]
    model = in_float32(tiny_model("qwen2_moe"), tmp_path / "float32")
    server = serve(model, "--device", "cpu", "--dtype", "float32", *flags, ranks=1)
    wait_measured(server)
    start = len(server.log.read_text())
    alone = [server.log_probabilities([prompt], [3, 40, 500])[0] for prompt in prompts]
    server.post("/flush_cache", {})
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: server.log_probabilities([prompt], [3, 40, 500])[0], prompts))
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=2e-3)  # in pieces of other sizes
    lines = [line for line in server.log.read_text()[start:].splitlines() if '"event": "gather"' in line]
    batches = [json.loads(line[line.index("{") :]) for line in lines]
    # Cut at T, which is measured, or at the floor where that is more. The last request may be as large as the target.
    floor = ModelCost.from_config(json.loads((tiny_model("qwen2_moe") / "config.json").read_text())).flops(64)
    assert all(batch["target_flops"] >= floor for batch in batches)
    assert all(batch["flops"] < 2 * batch["target_flops"] for batch in batches)
    # The longest prompt alone is more than a dozen times the floor.
    assert len(batches) > 2 * len(prompts)


@pytest.mark.server
def test_served_from_disk_is_served_the_same(tiny_model: Callable[[str], Path], serve: Callable[..., Server]) -> None:
    numbers = random.Random(1)
    prompts = [[numbers.randrange(3, 512) for _ in range(numbers.randrange(20, 200))] for _ in range(8)]
    model = tiny_model("qwen2_moe")
    answers = []
    from_disk = ["--asyncep-expert-memory", "100KB", "--asyncep-gather-depth", "3"]
    for flags in ([], [*from_disk, "--asyncep-resident-experts", "3", "--asyncep-kv-free"]):
        server = serve(model, "--device", "cpu", *flags, ranks=1)
        answers.append([server.log_probabilities([prompt], [3, 40, 500])[0] for prompt in prompts])
        status = server.status()
        metrics = httpx.get(server.url + "/metrics", timeout=30).text
        server.stop()
    assert answers[0] == answers[1]
    expert = 3 * 64 * 32 * 2
    # The first layer's seven, and three of each of the others.
    kept = (7 + 2 * 3) * expert
    assert status["expert_bytes"] == status["ranks"][0]["bytes_read"] == kept
    assert kept <= status["resident_bytes"] < kept + 6 * status["page_bytes"]
    assert status["gathers"][0]["layers"] == 2
    assert f'asyncep_gather_layer_bytes{{rank="0"}} {float(4 * expert)}' in metrics
    assert 'asyncep_gather_peak_threshold_flops{rank="0"}' in metrics
    assert 'asyncep_gather_digest_failures_total{rank="0"} 0.0' in metrics
