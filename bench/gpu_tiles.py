"""Which tiles an expert GEMM may have, and how long a batch takes with them at best: a roofline of one GEMM.

Per multiprocessor and step of the loop, three things take time side by side: the matrix units, the tiles' way from
the L2 cache (which Little's law limits: bytes in flight over the latency), and the share of the memory's bandwidth.
Padded rows are computed like others, and the last wave of programs leaves processors idle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from asyncep_kernels.aot import LIMITS
from asyncep_kernels.moe.configs import MoeConfig, Scheme, Tile
from asyncep_kernels.moe.quant import Format
from asyncep_router.cost.devices import Device, Number

# Of a load under load. Published microbenchmarks on idle devices: 200-270 cycles to L2, 480-570 to memory.
LATENCY = 0.8e-6
# Waiting for a tile and telling all warps: what a step costs beside its work, unless another program fills it.
STEP = 60e-9
# Of the matrix units' rate that their feeding by registers leaves to mma.sync; wgmma reads shared memory itself.
MMA_SHARE = {"sm_80": 0.85, "sm_90": 0.6}
# Registers that a thread needs beside its sums.
OTHER_REGISTERS = 80


@dataclass(frozen=True)
class Gemm:
    """One of a layer's two GEMMs and its batch."""

    depth: int
    width: int
    gated: bool
    experts: int
    rows: float
    """An expert's, on average."""


def tiles(scheme: Scheme, arch: str, rows: int, *, gated: bool) -> Iterator[Tile]:
    """Tiles that could run with blocks of ``rows``: shared memory and registers hold them, by estimate."""
    weight_size = 2 if scheme.weights is Format.PLAIN else 1
    x_size = 1 if scheme.activations else 2
    sides = 2 if gated else 1
    for n, k, warps, stages in product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)):
        config = MoeConfig(rows, Tile(n, k, warps, stages), Tile(n, k, warps, stages))
        if (gated and scheme.fits(config)) or (not gated and scheme.weights is Format.FP8 and 128 % k):
            continue
        if _buffers(arch, rows, stages) * k * (rows * x_size + sides * n * weight_size) > LIMITS[arch][0]:
            continue
        # Scaled partial products lie beside the sums.
        sums = rows * n * (sides + (1 if scheme.weights is Format.FP8 else 0)) / (32 * warps)
        if sums + OTHER_REGISTERS > 255 or rows * n < 32 * warps * 4:
            continue
        yield Tile(n, k, warps, stages)


def _wgmma(arch: str, rows: int) -> bool:
    return arch == "sm_90" and rows >= 64


def _buffers(arch: str, rows: int, stages: int) -> int:
    """Tiles in shared memory, as Triton lays them out: wgmma reads its operands there, mma.sync from registers."""
    return stages if _wgmma(arch, rows) else stages - 1


def seconds(gemm: Gemm, rows: int, tile: Tile, scheme: Scheme, device: Device, programs: int) -> float:
    """The least time of ``gemm`` with blocks of ``rows``, ``programs`` of them on a multiprocessor at once."""
    sides = 2 if gemm.gated else 1
    weight_size = 2 if scheme.weights is Format.PLAIN else 1
    x_size = 1 if scheme.activations else 2
    # Ragged ends: half a block an expert where it has several, never less than one block.
    blocks = gemm.experts * max(1.0, gemm.rows / rows + 0.5 * (1 - math.exp(-gemm.rows / rows)))
    columns = math.ceil(gemm.width / tile.n)
    steps = math.ceil(gemm.depth / tile.k)
    number = {Format.FP8: Number.FP8, Format.INT8: Number.INT8}.get(scheme.weights) if scheme.activations else None
    rate = device.product_rate(number or Number.BF16) / device.processors
    # wgmma takes 64 rows; narrower blocks use mma.sync.
    rate *= 1.0 if _wgmma(device.architecture, rows) else MMA_SHARE[device.architecture]
    step_bytes = tile.k * (rows * x_size + sides * tile.n * weight_size)
    step_flops = 2 * rows * tile.n * sides * tile.k
    # Without wgmma a step's tile is in registers before its products begin, and its buffer is filled again meanwhile.
    ahead = tile.stages - 1 if _wgmma(device.architecture, rows) else tile.stages - 1.5
    in_flight = programs * ahead * step_bytes
    feed = min(device.cache_bytes / device.processors, in_flight / LATENCY)
    step = max(step_flops / rate, step_bytes / feed) + STEP / programs
    concurrent = device.processors * programs
    total = blocks * columns
    # A wave takes as long as its programs' work one after another on each processor.
    waves = max(1.0, total / concurrent) if total > 4 * concurrent else math.ceil(total / concurrent)
    busy = waves * programs * (steps * step + LATENCY)
    memory = gemm.experts * sides * gemm.width * gemm.depth * weight_size
    memory += gemm.experts * gemm.rows * (gemm.depth * x_size + gemm.width * 2)
    # Neither hides the other wholly: of two tiles bound by memory, the one that computes faster.
    times = sorted((busy, memory / device.memory_bytes))
    return times[1] + 0.1 * times[0]
