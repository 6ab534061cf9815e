"""The attention backend chosen on CUDA, and that SGLang and FlashInfer are what the choice relies on."""

from __future__ import annotations

import argparse
import ast
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher.cuda_attention import (
    ORDER,
    PAGED_VARIABLE,
    AttentionNeeds,
    CudaHost,
    choose,
    needs_of,
)

H100 = CudaHost((9, 0), flashinfer=True, fa3=True)
PLAIN = AttentionNeeds(128)


def test_flashinfer_first_then_what_is_there() -> None:
    assert choose(H100, PLAIN).backend == "flashinfer"
    assert choose(CudaHost((9, 0), False, True), PLAIN).backend == "fa3"
    fallback = choose(CudaHost((8, 0), False, False), PLAIN)
    assert fallback.backend == "triton"
    assert list(fallback.passed_over) == ["flashinfer", "fa3"]


def test_what_flashinfer_cannot_compute_goes_elsewhere() -> None:
    assert choose(H100, AttentionNeeds(64, sinks=True, window=True)).backend == "fa3"
    assert choose(H100, AttentionNeeds(80)).backend == "fa3"
    assert choose(H100, AttentionNeeds(192, latent=True)).backend == "flashinfer"
    assert choose(CudaHost((8, 0), False, True), AttentionNeeds(192, latent=True)).backend == "triton"


def test_windows_take_the_paged_wrapper() -> None:
    assert choose(H100, AttentionNeeds(128, window=True)).environment == {PAGED_VARIABLE: "1"}
    assert choose(H100, PLAIN).environment == {PAGED_VARIABLE: "0"}


def test_kv_free_neither_keeps_nor_cuts_prompts() -> None:
    flags = choose(H100, PLAIN, kv_free=True).flags
    assert "--disable-radix-cache" in flags
    assert flags[flags.index("--chunked-prefill-size") + 1] == "-1"
    assert "--disable-radix-cache" not in choose(H100, PLAIN).flags


def test_a_requested_backend_is_taken_or_refused_with_the_reason() -> None:
    assert choose(H100, PLAIN, requested="triton").backend == "triton"
    assert choose(H100, PLAIN, requested="fa4").flags[:2] == ("--attention-backend", "fa4")
    with pytest.raises(UsageError, match="--attention-backend flashinfer: SGLang passes no attention sinks"):
        choose(H100, AttentionNeeds(64, sinks=True), requested="flashinfer")


@given(
    st.builds(CudaHost, st.sampled_from([(7, 5), (8, 0), (8, 9), (9, 0)]), st.booleans(), st.booleans()),
    st.builds(AttentionNeeds, st.sampled_from([64, 80, 128, 192]), st.booleans(), st.booleans(), st.booleans()),
)
def test_something_always_serves_and_everything_before_it_has_a_reason(host: CudaHost, needs: AttentionNeeds) -> None:
    choice = choose(host, needs)
    assert list(choice.passed_over) == list(ORDER[: ORDER.index(choice.backend)])
    assert all(choice.passed_over.values())
    assert choose(host, needs, requested=choice.backend).backend == choice.backend


def test_needs_are_read_from_the_configuration() -> None:
    base = {
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 128,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "vocab_size": 10,
    }
    assert needs_of(base) == PLAIN
    gpt_oss = {**base, "model_type": "gpt_oss", "intermediate_size": 8, "sliding_window": 128, "head_dim": 64}
    assert needs_of(gpt_oss) == AttentionNeeds(64, sinks=True, window=True)


# The contract with the pinned versions.


def _wrapper_calls() -> list[tuple[str, str, int, tuple[str, ...]]]:
    """(class, method, positional arguments, keywords) of every call SGLang makes of FlashInfer's prefill wrappers."""
    import sglang

    source = Path(sglang.__file__).parent / "srt/layers/attention/flashinfer_backend.py"
    kinds = {"ragged": "BatchPrefillWithRaggedKVCacheWrapper", "paged": "BatchPrefillWithPagedKVCacheWrapper"}
    found = []
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call):
            continue
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        if isinstance(node.func, ast.Name) and node.func.id in kinds.values():
            found.append((node.func.id, "__init__", len(node.args), keywords))
        if isinstance(node.func, ast.Attribute) and node.func.attr in (
            "begin_forward",
            "forward",
            "forward_return_lse",
        ):
            of = ast.unparse(node.func.value)
            for kind, name in kinds.items():
                if "wrapper" in of and kind in of:
                    found.append((name, node.func.attr, len(node.args), keywords))
    return found


def test_flashinfer_takes_what_sglang_passes() -> None:
    flashinfer = pytest.importorskip("flashinfer")
    assert version("flashinfer-python") == "0.7.2", "another version: read the calls anew"
    calls = _wrapper_calls()
    # Both wrappers are made, planned and run: else this test looks at the wrong file.
    for name in ("BatchPrefillWithRaggedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"):
        assert {"__init__", "begin_forward", "forward"} <= {method for kind, method, *_ in calls if kind == name}
    for name, method, positional, keywords in calls:
        signature: Any = inspect.signature(getattr(getattr(flashinfer, name), method))
        signature.bind_partial(None, *[None] * positional, **dict.fromkeys(keywords))


def test_the_ragged_wrapper_forgets_the_window_it_is_not_given() -> None:
    """Why windows take the paged wrapper: should SGLang pass it, or the default change, the choice may go back."""
    flashinfer = pytest.importorskip("flashinfer")
    forward = inspect.signature(flashinfer.BatchPrefillWithRaggedKVCacheWrapper.forward)
    assert forward.parameters["window_left"].default == -1
    calls = [call for call in _wrapper_calls() if call[:2] == ("BatchPrefillWithRaggedKVCacheWrapper", "forward")]
    assert calls
    assert all("window_left" not in keywords for *_, keywords in calls)


def test_sglang_takes_every_flag() -> None:
    from sglang.srt.environ import envs
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for backend in ORDER:
        flags = choose(H100, PLAIN, requested=backend, kv_free=True).flags
        parsed = parser.parse_args(["--model-path", "x", *flags])
        assert parsed.attention_backend == backend
        assert parsed.disable_cuda_graph
        assert parsed.chunked_prefill_size == -1
    assert envs.SGLANG_FLASHINFER_USE_PAGED.name == PAGED_VARIABLE
