"""Serving on GPUs: every decision that is made before one is touched."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from asyncep_sgl.config.run import CONFIG_VARIABLE, AsyncEPConfig
from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher import launch
from asyncep_sgl.launcher.command_line import parse, sglang_arguments
from asyncep_sgl.launcher.cuda_attention import PAGED_VARIABLE, CudaHost
from asyncep_sgl.launcher.cuda_host import Gpu, find_gpus, installed, visible
from asyncep_sgl.launcher.cuda_serving import CudaPlan, plan
from asyncep_sgl.process.ports import free_port

GIB = 1 << 30
H100 = Gpu("NVIDIA H100", (9, 0), 80 * GIB)
A10 = Gpu("NVIDIA A10", (8, 6), 24 * GIB)
T4 = Gpu("Tesla T4", (7, 5), 16 * GIB)
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
}


def planned(config: dict[str, Any], gpus: list[Gpu], *arguments: str) -> CudaPlan:
    options = parse(["--model", "m", "--device", "cuda", *arguments])
    return plan(options, config, gpus, CudaHost(gpus[0].capability, flashinfer=True, fa3=True))


@pytest.mark.parametrize(
    ("config", "gpus", "arguments", "transport"),
    [
        (QWEN3_30B, [H100], [], "cuda"),
        (QWEN3_30B, [A10], [], "pinned"),
        (QWEN3_30B, [A10] * 8, ["--dp-size", "8"], "cuda"),
        (QWEN3_235B, [H100], [], "pinned"),
        (QWEN3_235B, [H100] * 8, ["--dp-size", "8"], "pinned"),  # 54 GiB a GPU, 10 of slots, 19 of attention
        (QWEN3_235B, [Gpu("H200", (9, 0), 141 * GIB)] * 8, ["--dp-size", "8"], "cuda"),
        (QWEN3_30B, [H100], ["--asyncep-transport", "pinned"], "pinned"),
        (QWEN3_30B, [H100], ["--asyncep-expert-memory", "10GiB"], "pinned"),
    ],
)
def test_experts_lie_on_the_gpus_where_they_fit(
    config: dict[str, Any], gpus: list[Gpu], arguments: list[str], transport: str
) -> None:
    found = planned(config, gpus, *arguments)
    assert found.transport == transport, found.reason
    assert found.group.divides == (transport == "pinned" or len(gpus) > 1)


def test_several_gpus_divide_the_experts() -> None:
    group = planned(QWEN3_30B, [H100] * 4, "--dp-size", "4").group
    assert (group.devices, group.depth, group.resident_layers, group.memory_limit) == (4, 2, 1, None)
    assert planned(QWEN3_30B, [H100] * 4, "--dp-size", "4", "--asyncep-gather-depth", "3").group.depth == 3


def test_one_gpu_keeps_the_first_layers_and_reads_further_ahead() -> None:
    layer = 3 * 128 * 768 * 2048 * 2
    group = planned(QWEN3_30B, [A10]).group
    assert group.depth == 4
    assert group.memory_limit is not None
    assert 8 * layer < group.memory_limit < 16 * layer
    asked = planned(QWEN3_30B, [H100], "--asyncep-expert-memory", "10GiB").group
    assert asked.memory_limit == 10 * GIB
    for arguments in (["--asyncep-expert-memory", "0"], ["--asyncep-transport", "pinned"]):
        none = planned(QWEN3_30B, [H100], *arguments).group
        assert none.memory_limit == 0
        assert none.divides
    most = planned(QWEN3_30B, [H100] * 1, "--asyncep-expert-memory", "500GiB").group
    assert most.memory_limit == 47 * layer, "something has to lie in host memory"


@pytest.mark.parametrize(
    ("config", "gpus", "arguments", "words"),
    [
        (QWEN3_30B, [H100], ["--dp-size", "2"], "--dp-size 2: a rank needs a GPU of its own and there are 1"),
        (QWEN3_30B, [T4], [], "Tesla T4 has compute capability 7.5"),
        (QWEN3_235B, [A10], ["--asyncep-transport", "cuda"], "--asyncep-transport cuda: .*--asyncep-transport pinned"),
        (QWEN3_30B, [H100], ["--nnodes", "2", "--dist-init-addr", "h:1"], "--nnodes 2: GPUs of several hosts"),
        (QWEN3_30B, [H100], ["--dtype", "float32"], "--dtype float32: on GPUs"),
        (QWEN3_30B, [Gpu("small", (8, 0), 2 * GIB)], [], "one layer's experts take 1.1 GiB"),
        (QWEN3_30B | {"head_dim": 96}, [H100], ["--attention-backend", "flashinfer"], "heads of 96"),
        (QWEN3_30B | {"head_dim": 96}, [H100], ["--attention-backend=flashinfer"], "heads of 96"),
    ],
)
def test_what_cannot_be_served_names_flag_and_fix(
    config: dict[str, Any], gpus: list[Gpu], arguments: list[str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        planned(config, gpus, *arguments)


def test_flags_go_to_sglang_and_the_users_win() -> None:
    options = parse(["--model", "m", "--dp-size", "2", "--device", "cuda", "--chunked-prefill-size", "99"])
    found = plan(options, QWEN3_30B, [H100, H100], CudaHost((9, 0), flashinfer=True, fa3=True))
    arguments = sglang_arguments(options, cpu=False, max_total_tokens=None, extra=found.flags)
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--attention-backend"] == "flashinfer"
    assert pairs["--moe-runner-backend"] == "triton"
    assert pairs["--device"] == "cuda"
    assert pairs["--chunked-prefill-size"] == "99"
    assert "--disable-cuda-graph" in arguments
    assert pairs["--page-size"] == "1"
    for flag in ("--page-size", "--chunked-prefill-size", "--attention-backend"):
        assert arguments.count(flag) == 1
    assert found.environment == {PAGED_VARIABLE: "0", "SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED": "0"}


def test_kv_free_on_gpus_neither_keeps_nor_cuts_prompts() -> None:
    whole = dict(itertools.pairwise(planned(QWEN3_30B, [H100], "--asyncep-kv-free").flags))
    assert whole["--chunked-prefill-size"] == "-1"
    assert "--disable-radix-cache" in planned(QWEN3_30B, [H100], "--asyncep-kv-free").flags
    # Where batches are cut by FLOPs a long prompt is cut too.
    divided = planned(QWEN3_30B, [H100] * 2, "--dp-size", "2", "--asyncep-kv-free").flags
    assert "-1" not in divided


def test_visible_devices() -> None:
    assert visible([H100, A10, T4], None) == [H100, A10, T4]
    assert visible([H100, A10, T4], "2, 0") == [T4, H100]
    assert visible([H100, A10], "") == []
    assert visible([H100, H100], "GPU-a,GPU-b") == [H100, H100]
    with pytest.raises(UsageError, match="this host has 1 GPUs"):
        visible([H100], "1")


@dataclass
class Recorded:
    """In the supervisor's place: what would be started."""

    started: ClassVar[list[Recorded]] = []
    store: Any
    command: list[str]
    environment: dict[str, str]
    listeners: Sequence[socket.socket] = ()
    signals: Any = None

    def run(self) -> int:
        self.started.append(self)
        self.store.close()
        for listener in self.listeners:
            listener.close()
        return 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_launcher_starts_what_was_planned(
    ranks: int, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(launch, "find_gpus", lambda: [H100] * ranks)
    monkeypatch.setattr(launch, "installed", lambda gpu: CudaHost(gpu.capability, flashinfer=False, fa3=False))
    monkeypatch.setattr(launch, "Supervisor", lambda *arguments, **_: Recorded(*arguments[:3]))
    Recorded.started.clear()
    model = str(tiny_model("qwen3_moe"))
    assert (
        launch.serve(parse(["--model", model, "--device", "cuda", "--dp-size", str(ranks), "--port", str(free_port())]))
        == 0
    )
    command, environment = Recorded.started[0].command, Recorded.started[0].environment
    assert command[command.index("--attention-backend") + 1] == "triton"  # neither of the others is installed
    monkeypatch.setenv(CONFIG_VARIABLE, environment[CONFIG_VARIABLE])
    config = AsyncEPConfig.from_environment()
    assert config is not None
    assert (config.transport, config.group.devices, config.cpus) == ("cuda", ranks, ())
    assert environment["ASYNCEP_PLATFORM"] == "off"
    assert "OMP_NUM_THREADS" not in {key for key in environment if key not in launch.os.environ}


def test_other_devices_and_misplaced_flags_are_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="--device xpu: served are cuda and cpu"):
        launch.serve(parse(["--model", "m", "--device", "xpu"]))
    with pytest.raises(UsageError, match="--asyncep-transport: only with all experts in one GPU's memory or"):
        launch.serve(parse(["--model", "m", "--device", "cpu", "--asyncep-transport", "pinned"]))


def test_gpus_are_what_nvml_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    answers: dict[str, Any] = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 2,
        "nvmlDeviceGetName": "NVIDIA H100",
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB),
    }
    for name, answer in answers.items():
        assert hasattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert find_gpus() == [H100]
    assert installed(H100).capability == (9, 0)
    assert not installed(A10).fa3

    def absent() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", absent)
    with pytest.raises(UsageError, match=r"no NVIDIA driver answers .*; use --device cpu"):
        find_gpus()
