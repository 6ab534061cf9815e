"""What the launcher asks of its host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.config.model_support import check_supported
from asyncep_sgl.config.run import LARGEST_BATCH_TOKENS
from asyncep_sgl.errors import UnsupportedModelError
from asyncep_sgl.launcher.kv_budget import LEAST_TOKENS, MOST_TOKENS, kv_tokens, one_batch_tokens
from asyncep_sgl.launcher.run_directory import run_directory
from asyncep_sgl.platform.detect import CPU_PLATFORM, activate
from asyncep_sgl.process.host import available_bytes, divide_cpus, format_bytes


@given(ranks=st.integers(1, 40), cpus=st.lists(st.integers(0, 500), min_size=1, max_size=64, unique=True))
def test_cpus_are_divided_evenly_and_completely(ranks: int, cpus: list[int]) -> None:
    parts = divide_cpus(ranks, cpus)
    assert len(parts) == ranks
    assert all(parts)
    assert {cpu for part in parts for cpu in part} <= set(cpus)
    if ranks <= len(cpus):
        assert sorted(cpu for part in parts for cpu in part) == sorted(cpus)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_memory_is_what_the_host_has() -> None:
    assert 0 < available_bytes() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


def test_kv_budget() -> None:
    config = json.loads((tiny_models.config("qwen3_moe")).to_json_string())
    one, two = (kv_tokens(config, ranks=ranks, free_bytes=1 << 26) for ranks in (1, 2))
    assert one == pytest.approx(2 * two, abs=2)
    # Keys and values of 2 heads of 16, 3 layers, 2 bytes each.
    assert one == pytest.approx(0.3 * (1 << 26) / (2 * 2 * 16 * 3 * 2), abs=1)
    assert kv_tokens(config, ranks=8, free_bytes=1) == LEAST_TOKENS
    assert kv_tokens(config, ranks=1, free_bytes=1 << 50) == MOST_TOKENS


def test_the_launcher_needs_no_torch() -> None:
    script = "import sys, asyncep_sgl.launcher.launch; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "dense model.*sglang serve"),
        ({"architectures": ["NewMoeForCausalLM"], "num_experts": 8}, "not among the served"),
        ({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32}, "attention sinks"),
        ({"architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": 64}, "latent attention"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "without a number of experts"),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 8,
                "quantization_config": {"quant_method": "fp8"},
            },
            r"quantised \(fp8\)",
        ),
        ({}, "unknown is a dense model"),
    ],
)
def test_models_that_are_not_served(config: dict[str, object], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        check_supported(config, device="cpu")


def test_platform_is_chosen_by_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASYNCEP_PLATFORM", "cpu")
    assert activate() == CPU_PLATFORM
    monkeypatch.setenv("ASYNCEP_PLATFORM", "off")
    assert activate() is None
    monkeypatch.setenv("ASYNCEP_PLATFORM", "gpu")
    with pytest.raises(SystemExit, match="not one of auto, cpu, off"):
        activate()
    monkeypatch.delenv("ASYNCEP_PLATFORM")
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_a_run_directory_goes_with_its_run_even_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A socket's path is limited and pytest's folders are deep; in /tmp itself other servers tidy up.
    base = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", base)
    monkeypatch.setenv("TMPDIR", base)
    with run_directory() as mine:
        assert mine.is_dir()
        with run_directory() as second:
            assert mine.is_dir()
            assert second != mine
        script = (
            "import os, signal\nfrom asyncep_sgl.launcher.run_directory import run_directory\n"
            "with run_directory() as d:\n    print(d, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)"
        )
        killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL
        left = Path(killed.stdout.strip())
        assert left.is_dir()
        with run_directory():
            assert not left.exists()
            assert mine.is_dir()
    assert os.listdir(base) == []
    os.rmdir(base)


def test_a_process_ends_with_its_launcher() -> None:
    script = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "'import os,sys,time; from asyncep_sgl.process.lifeline import die_with; die_with(os.getppid()); "
        "print(os.getpid(), flush=True); time.sleep(600)'], stdout=subprocess.PIPE, text=True)\n"
        "print(child.stdout.readline(), flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        descriptor = os.pidfd_open(child)
        launcher.kill()
    import select

    assert select.select([descriptor], [], [], 10)[0], "the child outlives its launcher"


def test_without_prefixes_the_cache_holds_the_longest_prompt_and_a_batch() -> None:
    config = {"max_position_embeddings": 8192}
    assert one_batch_tokens(config, []) == 8192 + LARGEST_BATCH_TOKENS
    assert one_batch_tokens(config, ["--context-length=6000", "--chunked-prefill-size", "2048"]) == 8048
    assert one_batch_tokens({}, ["--chunked-prefill-size", "-1"]) == LEAST_TOKENS
