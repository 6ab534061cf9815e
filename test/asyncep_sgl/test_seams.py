"""The contract with the pinned SGLang: every seam exists with the parameters it was written against."""

import os
import subprocess
import sys

import pytest
from sglang.srt.plugins.hook_registry import HookType

from asyncep_sgl import plugin
from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.config.settings import RunSettings
from asyncep_sgl.errors import SeamError
from asyncep_sgl.process import seam
from asyncep_sgl.process.seam import Seam, assert_active
from asyncep_sgl.rank import seams as rank
from asyncep_sgl.upstream_check import check_overrides, check_upstream


def test_upstream_is_as_expected() -> None:
    check_upstream()


@pytest.mark.parametrize(
    "seam",
    [
        Seam("sglang.srt.managers.scheduler.Scheduler.no_such_method", print, HookType.AFTER, ()),
        Seam("sglang.srt.managers.scheduler.Scheduler.run_event_loop", print, HookType.AFTER, ("x",)),
    ],
)
def test_a_moved_seam_is_named(seam: Seam, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "SEAMS", (seam,))
    with pytest.raises(SeamError, match=seam.target):
        check_upstream()


def test_a_seam_that_was_not_hooked_stops_the_start() -> None:
    # This process never loaded SGLang's plug-ins, so nothing is hooked here.
    with pytest.raises(SystemExit, match="could not be hooked"):
        assert_active()


def test_a_plug_in_that_broke_off_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang logs what a plug-in raises, and goes on."""
    monkeypatch.setattr(seam, "_asked_for", ["sglang.some.target"])
    monkeypatch.setattr(seam.HookRegistry, "_patched", {"sglang.some.target"})
    with pytest.raises(SystemExit, match="processes, for a reason that SGLang has logged"):
        assert_active()
    monkeypatch.setattr(seam, "_complete", False)
    seam.hooked_all()
    assert_active()
    monkeypatch.setattr(seam, "_asked_for", ["sglang.some.target", "sglang.other.target"])
    with pytest.raises(SystemExit, match=r"sglang\.other\.target could not be hooked"):
        assert_active()


@pytest.mark.parametrize(
    ("transport", "kernels", "seams"),
    [
        ("host", "ours", ()),
        ("cuda", "ours", (*rank.CUDA_SEAMS, *rank.CUDA_KERNEL_SEAMS)),
        ("pinned", "ours", (*rank.CUDA_SEAMS, *rank.CUDA_KERNEL_SEAMS)),
        ("cuda", "sglang", rank.CUDA_SEAMS),
    ],
)
def test_a_runs_seams_are_those_of_its_transport(
    transport: str, kernels: str, seams: tuple[Seam, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = AsyncEPConfig(
        ranks=1,
        store_address="",
        launcher_pid=1,
        load_board="",
        transport=transport,  # type: ignore[arg-type]
        settings=RunSettings(kernels=kernels),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(plugin, "our_kernels", lambda config: False)
    assert plugin.seams_of(run) == (*plugin.SEAMS, *seams)


def _ours() -> list[type]:
    """Every class of this project that is made from one of SGLang's."""
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from small_moe import COST

    import asyncep_sgl.platform.cpu
    import asyncep_sgl.rank.cpu_attention
    import asyncep_sgl.router.controller  # noqa: F401
    from asyncep_sgl.rank.flops_batches import adder_class
    from asyncep_sgl.rank.one_kind import one_kind
    from asyncep_sgl.rank.router_batches import bounded

    made = (adder_class(COST, lambda: 1.0), one_kind(PrefillAdder), bounded(COST, 8)(PrefillAdder))
    found, todo = set(made), [object]
    while todo:
        kinds = [kind for kind in type.__subclasses__(todo.pop()) if kind not in found]
        found.update(kinds)
        todo += kinds
    return sorted(
        (kind for kind in found if _of(kind) == "asyncep" and any(_of(base) == "sglang" for base in kind.__mro__)),
        key=lambda kind: kind.__qualname__,
    )


def _of(kind: type) -> str:
    """``asyncep`` for a class of this project, ``sglang`` for one of SGLang's."""
    package = str(vars(kind).get("__module__", "")).partition(".")[0]
    return "asyncep" if package.startswith("asyncep_") else package


def test_what_is_overridden_is_there_and_what_is_ours_is_not() -> None:
    ours = _ours()
    assert {"RouterController", "RankLife", "SharedRadixTree", "CpuPrefillBackend", "AnyCpuPlatform"} <= {
        kind.__name__ for kind in ours
    }
    for kind in ours:
        check_overrides(kind)


def test_an_override_that_upstream_has_dropped_is_named() -> None:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from typing_extensions import override

    class Gone(PrefillAdder):  # type: ignore[misc]
        @override
        def no_such_method(self) -> None: ...

    class Clash(PrefillAdder):  # type: ignore[misc]
        def add_one_req(self, req: object) -> None: ...

    class Moved(PrefillAdder):  # type: ignore[misc]
        @override
        def add_one_req(self, request: object, *rest: object) -> None: ...

    for kind, reason in ((Gone, "overrides nothing"), (Clash, "mark it with @override"), (Moved, "SGLang's")):
        with pytest.raises(SeamError, match=reason):
            check_overrides(kind)


# In a process of its own: hooks stay. A hook does not reach another name of its target in the same module, so each is
# called by the name that SGLang's own caller uses, which must be one it knows.
_CALLS = """
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.moe import fused_moe_native, topk
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.models import qwen3_moe
from asyncep_sgl.rank import cpu_operators

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
