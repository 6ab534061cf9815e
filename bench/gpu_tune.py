"""Chooses the tiles in ``kernels/asyncep_kernels/moe/configs.json``.

    python bench/gpu_tune.py --choose --write            by the roofline and the compiler; needs no GPU
    python bench/gpu_tune.py --measure --write           times the roofline's best on this GPU, keeps the fastest

Rows an expert, in three classes: few (memory-bound), some, many. A class's configuration is the one whose time,
summed over the models' layers, is least, among those that compile without spilling.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_models import MODELS
from gpu_tiles import Gemm, seconds, tiles

from asyncep_kernels.aot import compile_variant, gemm_variant
from asyncep_kernels.moe.configs import SCHEMES, UNSUPPORTED, MoeConfig, Scheme, Tile
from asyncep_router.cost import read_shape
from asyncep_router.cost.devices import A100, H100, Device

CONFIGS = Path(__file__).parents[1] / "kernels/asyncep_kernels/moe/configs.json"
# Most rows an expert of each class, what it is chosen for, and its blocks' rows.
CLASSES: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (32, 16, (16,)),
    (192, 96, (64,)),
    (1 << 30, 768, (64, 128)),
)
DEVICE = {"sm_80": A100, "sm_90": H100}
# How many of the roofline's best that do not spill are looked at by their true occupancy, or by the clock.
COMPILED, MEASURED = 4, 10


def gemms(rows: int, *, gated: bool) -> list[Gemm]:
    """The models' GEMMs with so many rows an expert."""
    found = []
    for config in MODELS.values():
        shape = read_shape(config)
        mlp = next(layer.mlp for layer in shape.layers if layer.mlp.experts)
        sides = (shape.hidden, mlp.expert_width)
        depth, width = sides if gated else sides[::-1]
        found.append(Gemm(depth, width, gated, mlp.experts, float(rows)))
    return found


def _whole(rows: int, tile: Tile, *, gated: bool) -> MoeConfig:
    """A configuration for one GEMM alone: the other's tile is any that fits."""
    other = Tile(128, 64, 4, 2)
    return MoeConfig(rows, tile if gated else other, other if gated else tile)


@cache
def programs(arch: str, scheme: Scheme, rows: int, tile: Tile, gated: bool) -> int:
    """That fit a multiprocessor, by the compiler; 0 if a variant spills: with the wait or not, masked or not."""
    config = _whole(rows, tile, gated=gated)
    found = []
    for awaits, masked in ((True, False), (False, True), (True, True)):
        found.append(compile_variant(gemm_variant(scheme, config, gated=gated, awaits=awaits, masked=masked), arch))
        if found[-1].complaint:
            return 0
    return found[0].programs


def ranked(
    arch: str, scheme: Scheme, rows: int, average: int, *, gated: bool, wanted: int = COMPILED
) -> list[tuple[float, Tile]]:
    """(seconds over all models, tile) of ``wanted`` tiles for blocks of ``rows``, best first; none of them spills."""
    device: Device = DEVICE[arch]
    work = gemms(average, gated=gated)

    def times(tile: Tile, resident: int) -> list[float]:
        return [seconds(gemm, rows, tile, scheme, device, resident) for gemm in work]

    # Two on a processor is what most turn out to be; then the compiler says.
    # Of equals, the one with more tiles in flight: the roofline knows no jitter.
    guessed = sorted(
        tiles(scheme, arch, rows, gated=gated), key=lambda tile: (float(f"{sum(times(tile, 2)):.2g}"), -tile.stages)
    )
    known: list[tuple[float, Tile]] = []
    for tile in guessed:
        resident = programs(arch, scheme, rows, tile, gated)
        if resident:
            known.append((sum(times(tile, resident)), tile))
        if len(known) == wanted:
            break
    return sorted(known, key=lambda pair: (float(f"{pair[0]:.2g}"), -pair[1].stages))


def choose(arch: str, scheme: Scheme) -> list[dict[str, Any]]:
    """The entries of ``configs.json`` for one architecture and scheme."""
    entries = []
    for up_to, average, blocks in CLASSES:
        best: tuple[float, int, Tile, Tile] | None = None
        for rows in blocks:
            sides = [ranked(arch, scheme, rows, average, gated=gated) for gated in (True, False)]
            if all(sides):
                total = sides[0][0][0] + sides[1][0][0]
                if best is None or total < best[0]:
                    best = (total, rows, sides[0][0][1], sides[1][0][1])
        if best is None:
            raise RuntimeError(f"{arch} {scheme.name}: no tile compiles without spilling")
        entries.append(entry(up_to, MoeConfig(best[1], best[2], best[3])))
        print(arch, scheme.name, entries[-1], f"{best[0] * 1e3:.2f} ms", flush=True)
    return entries


def measure(arch: str, scheme: Scheme) -> list[dict[str, Any]]:
    """As `choose`, by the clock of this GPU over the roofline's best."""
    entries = []
    for up_to, average, blocks in CLASSES:
        best: tuple[float, MoeConfig] | None = None
        for rows in blocks:
            gate_up = [tile for _, tile in ranked(arch, scheme, rows, average, gated=True, wanted=MEASURED)]
            down = [tile for _, tile in ranked(arch, scheme, rows, average, gated=False, wanted=MEASURED)]
            if not gate_up or not down:
                continue
            # The two GEMMs do not touch each other's time: first one, then the other.
            first = min((_clock(scheme, MoeConfig(rows, tile, down[0]), average), tile) for tile in gate_up)[1]
            timed = min((_clock(scheme, MoeConfig(rows, first, tile), average), tile) for tile in down)
            if best is None or timed[0] < best[0]:
                best = (timed[0], MoeConfig(rows, first, timed[1]))
        if best is None:
            raise RuntimeError(f"{arch} {scheme.name}: no tile compiles without spilling")
        entries.append(entry(up_to, best[1]))
        print(arch, scheme.name, entries[-1], f"{best[0] * 1e3:.2f} ms", flush=True)
    return entries


def _clock(scheme: Scheme, config: MoeConfig, average: int) -> float:
    """Seconds of one layer of Qwen3-30B-A3B with ``average`` rows an expert: the median of 20 after 5."""
    from gpu_cases import case, run

    work = case(scheme, tokens=average * 128 // 8, hidden=2048, inter=768, experts=128, top_k=8, device="cuda", seed=0)
    times = []
    for turn in range(25):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(work, config)
        end.record()
        end.synchronize()
        if turn >= 5:
            times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def entry(up_to: float, config: MoeConfig) -> dict[str, Any]:
    """As ``configs.json`` spells it."""
    return {
        "up_to_rows": up_to,
        "rows": config.rows,
        "group": config.group,
        "gate_up": list(config.gate_up),
        "down": list(config.down),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--choose", action="store_true", help="by the roofline and the compiler")
    how.add_argument("--measure", action="store_true", help="on this machine's GPU")
    parser.add_argument("--scheme", nargs="+", choices=sorted(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--arch", nargs="+", choices=sorted(DEVICE), default=sorted(DEVICE), help="for --choose")
    parser.add_argument("--write", action="store_true", help=f"into {CONFIGS.name}; the rest of it stays")
    options = parser.parse_args()
    architectures = options.arch
    if options.measure:
        if not torch.cuda.is_available():
            print("--measure: no GPU here; --choose needs none", file=sys.stderr)
            return 1
        architectures = ["sm_80" if torch.cuda.get_device_capability()[0] == 8 else "sm_90"]
    configs: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text())
    for arch in architectures:
        for name in options.scheme:
            if (arch, name) not in UNSUPPORTED:
                found = (measure if options.measure else choose)(arch, SCHEMES[name])
                configs.setdefault(arch, {})[name] = found
                if options.write:
                    CONFIGS.write_text(json.dumps(configs, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
