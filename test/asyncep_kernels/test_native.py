"""The C kernels on each instruction set: built, and right against the references."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import Case, compare

from asyncep_kernels.moe import cpu as moe
from asyncep_kernels.moe import reference as moe_reference
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.native import build, isa
from asyncep_kernels.native.isa import Isa
from asyncep_kernels.native.library import library
from asyncep_kernels.norm import cpu as norm
from asyncep_kernels.norm import reference as norm_reference
from asyncep_kernels.rotary import cpu as rotary
from asyncep_kernels.rotary import reference as rotary_reference
from asyncep_kernels.routing import cpu as routing
from asyncep_kernels.routing import reference as routing_reference

# The fixture says which kernels serve; all examples of a test use the same.
each = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
on_each_isa = pytest.mark.parametrize("wanted", list(Isa), ids=lambda wanted: wanted.value)
Use = Callable[[Isa], None]


@on_each_isa
def test_the_kernels_asked_for_serve(wanted: Isa, use_isa: Use) -> None:
    use_isa(wanted)
    assert (library() is None) == (wanted is Isa.NONE)


@on_each_isa
@each
@given(st.data())
def test_experts(wanted: Isa, use_isa: Use, data: st.DataObject) -> None:
    use_isa(wanted)
    tokens, experts, k = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    width, inter = (32 * data.draw(st.integers(1, 4)) for _ in range(2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    wide = torch.randn(tokens, width + 32, generator=generator).bfloat16()
    hidden = wide[:, :width]  # rows that lie apart
    w13 = torch.randn(experts, 2 * inter, width, generator=generator).bfloat16() / width**0.5
    w2 = torch.randn(experts, width, inter, generator=generator).bfloat16() / inter**0.5
    # Some of the tokens' choices only, so that some experts are crowded and others empty.
    among = torch.tensor(data.draw(st.lists(st.integers(-1, experts - 1), min_size=1, max_size=4)))
    ids = among[torch.randint(len(among), (tokens, k), generator=generator)].int()
    weights = torch.rand(tokens, k, generator=generator)
    table = ExpertTable(w13, w2) if data.draw(st.booleans()) else ExpertTable(list(w13), list(w2))
    exact = moe_reference.moe(hidden.float(), ids, weights, ExpertTable(w13.float(), w2.float()))
    found = moe.moe(hidden, ids, weights, table)
    assert found.dtype == torch.bfloat16
    if exact.numel():
        assert (found.float() - exact).abs().max() <= 0.02 * exact.abs().max() + 1e-6


@on_each_isa
def test_a_tokens_result_does_not_depend_on_its_batch(wanted: Isa, use_isa: Use) -> None:
    """Bits: C kernels add up in one order, whatever else is computed."""
    if wanted is Isa.NONE:
        pytest.skip("torch's GEMMs promise no such thing")
    use_isa(wanted)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(300, 64, generator=generator).bfloat16()
    table = ExpertTable(
        torch.randn(4, 64, 64, generator=generator).bfloat16(), torch.randn(4, 64, 32, generator=generator).bfloat16()
    )
    ids = torch.randint(4, (300, 2), generator=generator)
    weights = torch.rand(300, 2, generator=generator)
    whole = moe.moe(hidden, ids, weights, table)
    for start, end in ((0, 1), (0, 33), (17, 300)):
        assert torch.equal(moe.moe(hidden[start:end], ids[start:end], weights[start:end], table), whole[start:end])


@on_each_isa
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "case",
    [
        Case([300, 5], [2300, 0], [0, 0]),
        Case([40, 30, 1, 200], [500, 400, 450, 0], [400, 400, 400, 0], page=16),
        Case([70], [250], [0], window=30, group=7),
        Case([8] * 40, [100] * 40, [64] * 40, v_dim=24),
    ],
)
def test_attention(wanted: Isa, use_isa: Use, case: Case, threads: int) -> None:
    use_isa(wanted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(case)
    finally:
        torch.set_num_threads(before)


@on_each_isa
@each
@given(st.integers(0, 300), st.integers(1, 3), st.integers(1, 80), st.booleans(), st.integers(0, 2**31))
def test_norms(wanted: Isa, use_isa: Use, tokens: int, heads: int, dim: int, with_residual: bool, seed: int) -> None:
    use_isa(wanted)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads * dim, generator=generator).bfloat16()
    weight = torch.rand(heads * dim, generator=generator).bfloat16()
    residual = torch.randn(x.shape, generator=generator).bfloat16() if with_residual else None
    found, summed = norm.rms_norm(x, weight, 1e-6, residual)
    exact, total = norm_reference.rms_norm(x, weight, 1e-6, residual)
    torch.testing.assert_close(found, exact, rtol=0.008, atol=1e-3)
    assert (summed is None) == (total is None)
    if summed is not None and total is not None:
        assert torch.equal(summed, total)
    if residual is not None:
        again, summed = norm.rms_norm(x.clone(), weight, 1e-6, residual.clone(), consume=True)
        assert torch.equal(again, found)
        assert summed is not None
        assert torch.equal(summed, total)
    wide = torch.randn(tokens, heads * dim + 7, generator=generator).bfloat16()
    part, rest = wide[:, : heads * dim], wide[:, heads * dim :].clone()
    exact, _ = norm_reference.rms_norm(part.reshape(tokens, heads, dim), weight[:dim], 1e-6)
    norm.rms_norm_heads_(part, weight[:dim], 1e-6)
    torch.testing.assert_close(part.reshape(exact.shape), exact, rtol=0.008, atol=1e-3)
    assert torch.equal(wide[:, heads * dim :], rest)


@on_each_isa
@each
@given(st.integers(0, 300), st.integers(1, 3), st.integers(1, 40), st.integers(0, 9), st.integers(0, 2**31))
def test_rotary(wanted: Isa, use_isa: Use, tokens: int, heads: int, half: int, rest: int, seed: int) -> None:
    use_isa(wanted)
    generator = torch.Generator().manual_seed(seed)
    dim = 2 * half + rest
    wide = torch.randn(tokens, heads * dim + 5, generator=generator).bfloat16()
    angles = torch.rand(20, half, generator=generator) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    positions = torch.randint(20, (tokens,), generator=generator)
    exact = rotary_reference.rotary_(wide.float()[:, : heads * dim], positions, table, dim)
    found = rotary.rotary_(wide[:, : heads * dim], positions, table, dim)
    torch.testing.assert_close(found.float(), exact, rtol=0.008, atol=1e-2)


@on_each_isa
@each
@given(st.data())
def test_routing(wanted: Isa, use_isa: Use, data: st.DataObject) -> None:
    use_isa(wanted)
    tokens, experts = data.draw(st.integers(0, 300)), data.draw(st.integers(1, 70))
    k, renormalize = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    weights, ids = routing.route(logits.to(dtype), k, renormalize)
    exact, chosen = routing_reference.route(logits.to(dtype), k, renormalize)
    torch.testing.assert_close(weights, exact, rtol=2e-5, atol=1e-6)
    # Logits tie, in bf16 often, and torch breaks ties as it likes: other experts have to be just as probable.
    probable = logits.to(dtype).float().softmax(-1)
    torch.testing.assert_close(probable.gather(1, ids.long()), probable.gather(1, chosen.long()), rtol=2e-5, atol=1e-6)
    assert all(len(set(row)) == k for row in ids.tolist())
    # Of equal logits the lower expert is first, but for torch. Logits that differ may still be equally probable.
    told_apart = _different(probable) == (experts if wanted is Isa.NONE else _different(logits.to(dtype)))
    assert torch.equal(ids[told_apart], chosen[told_apart])


def _different(rows: torch.Tensor) -> torch.Tensor:
    """How many different numbers each row has."""
    return 1 + (rows.float().sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1)


def test_shapes_that_do_not_fit_are_named() -> None:
    x = torch.zeros(3, 8).bfloat16()
    with pytest.raises(ValueError, match="no whole number of heads of 3"):
        norm.rms_norm_heads_(x, torch.ones(3), 1e-6)
    with pytest.raises(ValueError, match="not T rows of heads"):
        rotary.rotary_(x, torch.zeros(2, dtype=torch.int64), torch.zeros(4, 4), 4)
    with pytest.raises(ValueError, match="k 9"):
        routing.route(x, 9, True)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.ENVIRONMENT, "sse9")
    with pytest.raises(ValueError, match="sse9 is none of amx"):
        isa.choose()


def test_kernels_are_built_once_and_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa.choose() is Isa.NONE:
        pytest.skip("this CPU uses no C kernels")
    monkeypatch.setenv("ASYNCEP_CACHE", str(tmp_path))
    command = [sys.executable, "-m", "asyncep_kernels.native.build"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    path = build.library_path(isa.choose())
    assert said == {f"kernels: {path}\n"}
    assert sorted(each.name for each in path.parent.iterdir()) == sorted([path.name, "lock"])
    before = path.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("flags\t\t: fpu avx2 avx512f", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_tile amx_bf16", True),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("model name\t: bf16", False),
    ],
)
def test_whether_a_cpu_computes_bf16(line: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa.Path, "read_text", lambda _: f"processor\t: 0\n{line}\n")
    assert isa.computes_bf16() == found
