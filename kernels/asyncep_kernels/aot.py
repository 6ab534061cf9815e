"""Compiles every Triton kernel for a GPU that need not be there, and tables what the compiler made of it.

    python -m asyncep_kernels.aot [--arch sm_80 sm_90] [--all] [--json FILE] [--markdown FILE]

Ends with 1 if a kernel spills registers, does not fit the device, or does not compile. Triton brings ``ptxas``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from asyncep_kernels.moe.configs import SCHEMES, MoeConfig, Scheme, table
from asyncep_kernels.moe.quant import BLOCK, Format
from asyncep_kernels.moe.triton import expert_gemm_kernel, gemm_meta
from asyncep_kernels.permute import triton as permute
from asyncep_kernels.quantize import triton as quantize

# Shared memory a program may have, shared memory and registers of a multiprocessor, its threads.
LIMITS = {"sm_80": (163 << 10, 164 << 10, 65536, 2048), "sm_90": (227 << 10, 228 << 10, 65536, 2048)}
# What CUDA keeps of a program's shared memory for itself.
RESERVED_SHARED = 1 << 10


class Variant(NamedTuple):
    """One kernel as it is compiled."""

    kernel: Any
    name: str
    types: dict[str, str]
    """Triton's type of each argument that is not a constexpr."""
    meta: dict[str, Any]
    """Constexprs, ``num_warps`` and ``num_stages``."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a variant."""

    arch: str
    name: str
    warps: int
    registers: int
    """Per thread."""
    shared: int
    """Bytes a program."""
    spill_bytes: int
    """Stores and loads, per thread."""
    stack_bytes: int
    programs: int
    """That fit a multiprocessor at once; 0 if none does."""
    products: str
    """Instructions that multiply matrices: wgmma, mma or none."""
    wide_copies: int
    """Asynchronous 16-byte copies to shared memory, in the code."""

    @property
    def complaint(self) -> str | None:
        """Why this must not be used; None if it may."""
        if self.spill_bytes or self.stack_bytes:
            return f"spills {self.spill_bytes} bytes, stack of {self.stack_bytes}"
        if self.programs == 0:
            return f"{self.shared} bytes of shared memory and {self.registers} registers do not fit"
        return None


def gemm_variant(
    scheme: Scheme, config: MoeConfig, *, gated: bool, awaits: bool = False, masked: bool = False
) -> Variant:
    """One of the expert GEMMs. Any depth that the tile divides compiles to the same code, any other to another."""
    tile = config.gate_up if gated else config.down
    stored = torch.bfloat16 if scheme.weights is Format.PLAIN else scheme.weights.dtype
    meta = gemm_meta(scheme, config, tile, tile.k * 16 + (8 if masked else 0), stored, gated, awaits)
    narrow = {Format.PLAIN: "*bf16", Format.FP8: "*fp8e4nv", Format.INT8: "*i8"}[scheme.weights]
    fused = gated and scheme.activations and scheme.weights is Format.FP8
    types = dict.fromkeys(("rows", "block_expert", "flags", "flag_of", "status"), "*i32")
    types |= dict.fromkeys(("epoch", "limit", "blocks", "assignments", "top_k", "depth", "width"), "i32")
    types |= {"x": narrow if scheme.activations else "*bf16", "out": narrow if fused else "*bf16"}
    types |= {"weights": "*i64", "weight_scales": "*i64", "x_scale": "*fp32", "out_scale": "*fp32"}
    name = f"{'gate_up' if gated else 'down'} {scheme.name} {config.rows}x{tile.n}x{tile.k} s{tile.stages}"
    return Variant(expert_gemm_kernel, name + " await" * awaits + " masked" * masked, types, meta)


def other_variants(arch: str) -> Iterator[Variant]:
    """The kernels around the GEMMs."""
    counts = dict.fromkeys(("assignments", "experts", "chunks", "blocks"), "i32")
    tensors = dict.fromkeys(("order", "chunk_counts", "counts", "rows", "block_expert", "position"), "*i32")
    every = {**counts, **tensors, "ids": "*i64"}
    count = {"CHUNK": permute.CHUNK, "BINS": 256, "num_warps": 4}
    yield Variant(permute.count_kernel, "permute count", every, count)
    scan = {"EXPERTS": permute.SCAN_EXPERTS, "CHUNKS": permute.SCAN_CHUNKS, "num_warps": 4}
    yield Variant(permute.scan_kernel, "permute scan", every, scan)
    for bins in (128, 256, 512):
        place = {"BLOCK": 128, "CHUNK": permute.CHUNK, "BINS": bins, "ORDERED": True}
        place["num_warps"] = permute.place_warps(bins)
        yield Variant(permute.place_kernel, f"permute place {bins}", every, place)
    types = {"rows": "*bf16", "position": "*i32", "weights": "*fp32", "out": "*bf16", "top_k": "i32", "width": "i32"}
    unpermute = {"WIDTH": 1024, "INTERPRETED": False, "num_warps": 4}
    yield Variant(permute.unpermute_kernel, "unpermute", types, unpermute)
    for name, dtype, largest in (("e4m3", "*fp8e4nv", 448.0), ("int8", "*i8", 127.0)):
        if arch == "sm_80" and name == "e4m3":
            continue
        for width in (BLOCK,) if name == "e4m3" else (1024, 2048, 4096, 8192):
            types = {"x": "*bf16", "q": dtype, "scales": "*fp32", "width": "i32", "group": "i32", "groups": "i32"}
            groups = max(1, quantize.TILE // width) if name == "e4m3" else 1
            meta = {"LARGEST": largest, "GROUPS": groups, "GROUP": width, "INTERPRETED": False}
            meta["num_warps"] = 8 if width >= quantize.TILE else 4
            yield Variant(quantize.quantize_kernel, f"quantize {name} {width}", types, meta)


def chosen_variants(arch: str, *, everything: bool) -> Iterator[Variant]:
    """Every kernel with the configurations in ``configs.json``.

    Without ``everything``, GEMMs with the configuration for the largest batches alone, and none masked.
    """
    yield from other_variants(arch)
    for name, sizes in table()[arch].items():
        configs = dict.fromkeys(config for _, config in (sizes if everything else sizes[-1:]))
        for config in configs:
            for gated in (True, False):
                for awaits in (False, True):
                    for masked in (False, True) if everything else (False,):
                        yield gemm_variant(SCHEMES[name], config, gated=gated, awaits=awaits, masked=masked)


def compile_variant(variant: Variant, arch: str) -> Compiled:
    """Compiles for ``arch``, "sm_80" or "sm_90".

    Raises:
        RuntimeError: ptxas refuses what Triton made.
    """
    meta = dict(variant.meta)
    options = {key: meta.pop(key) for key in ("num_warps", "num_stages") if key in meta}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, argument in enumerate(variant.kernel.arg_names):
        signature[argument] = "constexpr" if argument in meta else variant.types[argument]
        # What the launcher would find out: tensors and sizes are divisible by 16.
        if signature[argument].startswith("*") or argument in ("depth", "width", "group"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(variant.kernel, signature, constexprs=meta, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", int(arch[3:]), 32), options=options)
    ptx = binary.asm["ptx"]
    log = _assemble(ptx, "sm_90a" if arch == "sm_90" else arch)
    registers = _first(r"Used (\d+) registers", log)
    shared = int(binary.metadata.shared)
    spilled = _first(r"(\d+) bytes spill stores", log) + _first(r"(\d+) bytes spill loads", log)
    warps = int(binary.metadata.num_warps)
    return Compiled(
        arch,
        variant.name,
        warps,
        registers,
        shared,
        spilled,
        _first(r"(\d+) bytes stack frame", log),
        _programs(arch, registers, shared, warps),
        "wgmma" if "wgmma.mma_async" in ptx else "mma" if re.search(r"\bmma\.sync", ptx) else "none",
        len(re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x10\b", ptx)),
    )


def _assemble(ptx: str, arch: str) -> str:
    """What ptxas says about ``ptx``."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", str(source), "-o", f"{folder}/cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr[:2000]}")
    return done.stderr


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas does not say {pattern!r}: {text[:500]}")
    return int(found[1])


def _programs(arch: str, registers: int, shared: int, warps: int) -> int:
    """Programs a multiprocessor holds at once."""
    own_shared, all_shared, all_registers, threads = LIMITS[arch]
    if shared > own_shared:
        return 0
    # Registers are given out by warp, in units of 256.
    by_registers = all_registers // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, all_shared // (shared + RESERVED_SHARED), threads // (32 * warps), 32)


def markdown(results: Sequence[Compiled]) -> str:
    """As a table."""
    lines = [
        "| architecture | kernel | warps | registers | shared KiB | spills | programs per SM | products |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.arch} | {r.name} | {r.warps} | {r.registers} | {r.shared / 1024:.1f} | {r.spill_bytes} | {r.programs} "
        f"| {r.products} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 if every kernel is fit for use."""
    parser = argparse.ArgumentParser(prog="python -m asyncep_kernels.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(LIMITS), default=sorted(LIMITS))
    parser.add_argument("--all", action="store_true", help="every configuration and variant, not one per format")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--markdown", type=Path, help="write the table there instead of printing it")
    options = parser.parse_args(arguments)
    results = [
        compile_variant(variant, arch)
        for arch in options.arch
        for variant in chosen_variants(arch, everything=options.all)
    ]
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    if options.markdown:
        options.markdown.write_text(markdown(results))
    else:
        print(markdown(results), end="")
    unfit = [result for result in results if result.complaint]
    for result in unfit:
        print(f"{result.arch} {result.name}: {result.complaint}", file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
