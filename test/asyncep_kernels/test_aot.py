"""Every kernel compiles for GPUs that are not here, without spilling, to the instructions it was written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncep_kernels.moe.configs import SCHEMES, UNSUPPORTED, MoeConfig, Tile, choose, table
from asyncep_kernels.moe.quant import Format


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without the interpreter that other tests may have asked for."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_chosen_configurations_compile_without_spilling(arch: str, tmp_path: Path) -> None:
    figures = tmp_path / "aot.json"
    done = run("-m", "asyncep_kernels.aot", "--arch", arch, "--json", str(figures))
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    gemms = [each for each in found if each["name"].startswith(("gate_up", "down"))]
    # Two GEMMs, with and without the wait, for every scheme the architecture multiplies.
    assert len(gemms) == 4 * len([name for name in SCHEMES if (arch, name) not in UNSUPPORTED])
    for each in found:
        assert each["spill_bytes"] == each["stack_bytes"] == 0
        assert each["programs"] > 0
        assert f"| {each['name']} |" in done.stdout
    for each in gemms:
        assert each["products"] == ("wgmma" if arch == "sm_90" else "mma")
        # Addresses come out of memory; that they are aligned has to be told, or copies are 4 bytes each.
        assert each["wide_copies"] > 0


def test_what_spills_is_refused() -> None:
    """A tile of sums that no register file holds."""
    code = """
from asyncep_kernels.aot import compile_variant, gemm_variant
from asyncep_kernels.moe.configs import SCHEMES, MoeConfig, Tile
config = MoeConfig(128, Tile(256, 32, 4, 2), Tile(256, 32, 4, 2))
print(compile_variant(gemm_variant(SCHEMES["bf16"], config, gated=True), "sm_80").complaint)
"""
    assert run("-c", code).stdout.startswith("spills")


def test_the_wait_is_an_acquire_behind_volatile_looks() -> None:
    code = """
import re
from asyncep_kernels import aot
from asyncep_kernels.moe.configs import SCHEMES, MoeConfig, Tile
seen = []
assemble = aot._assemble
aot._assemble = lambda ptx, arch: seen.append(ptx) or assemble(ptx, arch)
config = MoeConfig(64, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3))
for awaits in (False, True):
    aot.compile_variant(aot.gemm_variant(SCHEMES["bf16"], config, gated=True, awaits=awaits), "sm_90")
for ptx in seen:
    looks, acquire = ptx.find("ld.volatile.global"), re.search(r"(ld|atom)\\.global\\.sys\\.acquire", ptx)
    # Behind the acquire, a barrier: the other threads' reads are ordered by it.
    print(looks >= 0, acquire is not None and looks < acquire.start() < ptx.index("bar.sync", acquire.start())
          < ptx.index("cp.async.cg", acquire.start()))
"""
    done = run("-c", code)
    assert done.stdout.split("\n")[:2] == ["False False", "True True"], done.stdout + done.stderr


def test_the_package_is_imported_without_triton() -> None:
    code = (
        "import sys, asyncep_kernels.moe.cpu, asyncep_kernels.moe.pointers, asyncep_kernels.moe.configs as c; c.table()"
    )
    assert run("-c", code + "; print('triton' in sys.modules)").stdout.strip() == "False"


def test_every_scheme_has_a_configuration_for_every_batch() -> None:
    for arch in ("sm_80", "sm_90"):
        assert set(table()[arch]) == {name for name in SCHEMES if (arch, name) not in UNSUPPORTED}
        for name, sizes in table()[arch].items():
            assert sorted(up_to for up_to, _ in sizes) == [up_to for up_to, _ in sizes]
            for rows in (0.1, 32, 33, 1e4, 1e12):
                config = choose(arch, SCHEMES[name], rows)
                assert SCHEMES[name].fits(config) is None
            assert choose(arch, SCHEMES[name], 1).rows <= choose(arch, SCHEMES[name], 1e6).rows


def test_tiles_that_do_not_fit_a_scheme_are_named() -> None:
    fp8 = SCHEMES["fp8"]
    assert fp8.weights is Format.FP8
    assert "gate_up.n=64" in str(fp8.fits(MoeConfig(64, Tile(64, 128, 4, 2), Tile(64, 128, 4, 2))))
    assert "must divide" in str(fp8.fits(MoeConfig(64, Tile(128, 96, 4, 2), Tile(64, 128, 4, 2))))
