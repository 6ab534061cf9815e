"""The contract with the pinned SGLang: every seam exists with the parameters it was written against."""

import os
import subprocess
import sys

import msgspec
import pytest

from asyncep_sgl import plugin
from asyncep_sgl.config import AsyncEPConfig
from asyncep_sgl.errors import SeamError
from asyncep_sgl.upstream_check import check_upstream


def test_upstream_is_as_expected() -> None:
    check_upstream()


@pytest.mark.parametrize(
    "seam",
    [
        plugin.Seam("sglang.srt.managers.scheduler.Scheduler.no_such_method", print, plugin.HookType.AFTER, ()),
        plugin.Seam("sglang.srt.managers.scheduler.Scheduler.run_event_loop", print, plugin.HookType.AFTER, ("x",)),
    ],
)
def test_a_moved_seam_is_named(seam: plugin.Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SEAMS", (seam,))
    with pytest.raises(SeamError, match=seam.target):
        check_upstream()


def test_a_seam_that_was_not_hooked_stops_the_start() -> None:
    # This process never loaded SGLang's plug-ins, so nothing is hooked here.
    with pytest.raises(SystemExit, match="could not be hooked"):
        plugin.assert_active()


@pytest.mark.parametrize(
    ("transport", "kernels", "seams"),
    [
        ("host", "ours", ()),
        ("cuda", "ours", (*plugin.CUDA_SEAMS, *plugin.CUDA_KERNEL_SEAMS)),
        ("pinned", "ours", (*plugin.CUDA_SEAMS, *plugin.CUDA_KERNEL_SEAMS)),
        ("cuda", "sglang", plugin.CUDA_SEAMS),
    ],
)
def test_a_runs_seams_are_those_of_its_transport(
    transport: str, kernels: str, seams: tuple[plugin.Seam, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = AsyncEPConfig(ranks=1, store_address="", launcher_pid=1, load_board="")
    monkeypatch.setattr(plugin, "_config", msgspec.structs.replace(run, transport=transport, kernels=kernels))
    monkeypatch.setattr(plugin, "_our_kernels", lambda: False)
    assert plugin._seams() == (*plugin.SEAMS, *seams)


# In a process of its own: hooks stay. A hook does not reach another name of its target in the same module, so each is
# called by the name that SGLang's own caller uses, which must be one it knows.
_CALLS = """
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.moe import fused_moe_native, topk
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.models import qwen3_moe
from asyncep_sgl import cpu_operators

def noted(name):
    def note(*args, **kwargs):
        print(name)
        raise StopIteration
    return note

for module, name in ((cpu_operators.routing, "route"), (cpu_operators.moe, "moe"),
                     (cpu_operators.norm, "rms_norm_heads_")):
    setattr(module, name, noted(name))

class Some:
    def __init__(self, **fields):
        self.__dict__.update(fields)

x = torch.zeros(2, 32)
norm = Some(cast_x_before_out_mul=False, fp32_residual=False, override_orig_dtype=None, variance_size_override=None,
            variance_epsilon=1e-6, weight=torch.ones(32))
layer = Some(w13_weight=torch.zeros(1, 64, 32), w2_weight=torch.zeros(1, 32, 32))
config = Some(activation="silu", gemm1_alpha=None, apply_router_weight_on_input=False)
for caller, module, name, arguments in (
    (topk.select_experts, topk, "fused_topk_native", (x, x, 1, True)),
    (UnquantizedFusedMoEMethod.forward_cpu, fused_moe_native, "moe_forward_native", (layer, x, (x, x, x), config)),
    (qwen3_moe.Qwen3MoeAttention.apply_qk_norm_rope, qwen3_moe, "apply_qk_norm", (x, x, norm, norm, 32)),
):
    if name not in caller.__code__.co_names:
        raise SystemExit(f"{caller} no longer calls {name}")
    try:
        getattr(module, name)(*arguments)
    except StopIteration:
        continue
    raise SystemExit(f"{name} is SGLang's own")
"""


def test_the_names_that_sglang_calls_are_hooked() -> None:
    run = AsyncEPConfig(ranks=1, store_address="", launcher_pid=os.getpid(), load_board="")
    environment = {**os.environ, **run.to_environment(), "ASYNCEP_PLATFORM": "cpu"}
    done = subprocess.run([sys.executable, "-c", _CALLS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["route", "moe", "rms_norm_heads_"]
