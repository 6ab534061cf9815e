"""The simulator at the papers' scale: AsyncEP against TP, EP, PP and DP-attention + EP on A100s, H100s and H200s.

    python bench/sim.py [--quick] [--scale SHARE] [--calibration FILE] [--plot FILE]

Prints tables beside the papers' figures, writes `bench/out/sim.json` and `bench/out/sim-*.png`. `--plot FILE` draws the
pictures of an earlier record again and runs nothing. The same seed gives the same figures on every machine, times
that the simulation itself takes apart. `docs/internals/simulator.md` has the model and its assumptions.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from records import Claim, write
from rich.console import Console
from rich.table import Table
from sim_cases import (
    FULL,
    MACHINES,
    QUICK,
    SEED,
    Scale,
    ablations,
    assumptions,
    compare_strategies,
    many_ranks,
    model_of,
    over_backlog,
    over_devices,
    over_links,
    placements,
    slower_kernels,
    three_systems,
    workloads,
)
from sim_plots import draw

from asyncep.sim import hardware
from asyncep.sim.calibration import compare, read_calibration
from asyncep.sim.skew import ExpertSkew
from asyncep.sim.strategies.registry import BASELINES

PAPER_SPEEDUP = {
    "mix": "1.35-1.37",
    "short": "1.30",
    "medium": "1.30",
    "long": "1.52-1.59",
    "ultra-long": "1.49",
}
PAPER_LEAST = {"mix": 1.35, "short": 1.30, "medium": 1.30, "long": 1.52, "ultra-long": 1.49}
PAPER_MFU = (0.298, 0.362)
PAPER_ROUTER = (1.16, 1.18)

console = Console(width=150)


def lead(case: dict[str, Any], names: tuple[str, ...] = BASELINES) -> tuple[str, float]:
    """(the fastest of `names`, AsyncEP's throughput over its); nan if none or AsyncEP does not run."""
    speeds = {name: case[name]["tokens_per_second"] for name in names if "refused" not in case[name]}
    if not speeds or "refused" in case["asyncep"]:
        return "", float("nan")
    best = max(speeds, key=speeds.__getitem__)
    return best, case["asyncep"]["tokens_per_second"] / speeds[best]


def run_papers(scale: Scale, calibration: Path | None) -> dict[str, Any]:
    """Every machine, model and workload."""
    prompts = workloads(scale)
    out: dict[str, Any] = {}
    for device, dtype in MACHINES:
        for name in scale.models:
            model = model_of(name, dtype)
            cluster = hardware.cluster(device, 8)
            if calibration and read_calibration(calibration).machine == device:
                cluster = read_calibration(calibration).apply(cluster)
            cases = out.setdefault(f"{name} on 8x{device} {dtype}", {})
            for workload, requests in prompts.items():
                # The paper's model gets the whole mix, the others a third of it.
                part = requests if name == scale.models[0] else requests[: max(48, len(requests) // 3)]
                started = time.perf_counter()
                cases[workload] = compare_strategies(model, cluster, part, ExpertSkew(), shares=workload == "mix")
                took = time.perf_counter() - started
                best, factor = lead(cases[workload])
                console.print(f"{name} 8x{device} {dtype} {workload}: {factor:.2f} over {best or '-'} ({took:.1f} s)")
    return out


def show_papers(cases: dict[str, Any]) -> None:
    table = Table(
        "AsyncEP with the router over …", "workload", *BASELINES, "best", "paper", "MFU", "of DP", "collective"
    )
    for name, by_workload in cases.items():
        for workload, case in by_workload.items():
            ours = case["asyncep"]
            if "refused" in ours:
                table.add_row(name, workload, *[""] * len(BASELINES), "", "", "does not fit", "", "")
                continue
            ratios = [f"{lead(case, (one,))[1]:.2f}" if "refused" not in case[one] else "-" for one in BASELINES]
            best, factor = lead(case)
            table.add_row(
                name,
                workload,
                *ratios,
                f"{factor:.2f} {best}",
                PAPER_SPEEDUP[workload] if name.startswith("qwen3-235b") else "",
                f"{ours['mfu']:.1%}",
                f"{ours['tokens_per_second'] / case['replicated']['tokens_per_second']:.3f}",
                f"{lead(case, ('asyncep-collective',))[1]:.2f}",
            )
    console.print(table)


def show_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Plain rows; throughputs without decimals, `-` where a layout does not fit."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*[_cell(row.get(column)) for column in columns])
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def show_named(title: str, cases: dict[str, Any]) -> None:
    keys = ("tokens_per_second", "mfu", "cached_share", "stalled", "imbalance", "p50", "p99")
    rows = []
    for name, case in cases.items():
        kept = {"does not fit": case["refused"][:60]} if "refused" in case else {k: case[k] for k in keys if k in case}
        rows.append({"": name, **kept})
    show_rows(title, rows)


def claims_of(raw: dict[str, Any]) -> list[Claim]:
    """What issue and papers want, beside what was simulated."""
    out = []
    for device, dtype in MACHINES:
        cases = raw["papers"][f"qwen3-235b-a22b on 8x{device} {dtype}"]
        for workload, least in PAPER_LEAST.items():
            where = f"8x{device} {dtype}, {workload}"
            others = tuple(name for name in BASELINES if name != "pp")
            out.append(Claim(f"over the best baseline, {where}", lead(cases[workload])[1], least, "x"))
            out.append(Claim(f"over the best but PP, {where}", lead(cases[workload], others)[1], least, "x"))
        out.append(
            Claim(f"MFU, 8x{device} {dtype}, mix", cases["mix"]["asyncep"]["mfu"], PAPER_MFU[0], "share of peak")
        )
        ours, bound = cases["mix"]["asyncep"], cases["mix"]["replicated"]
        out.append(
            Claim(
                f"over replicated DP, 8x{device} {dtype}, mix",
                ours["tokens_per_second"] / bound["tokens_per_second"],
                0.95,
                "x",
            )
        )
    for name, cases in raw["placements"].items():
        if "refused" not in cases:
            gain = cases["asyncep"]["tokens_per_second"] / cases["round_robin"]["tokens_per_second"]
            out.append(Claim(f"the router over round robin, {name}", gain, PAPER_ROUTER[0], "x"))
    ranks = raw["many_ranks"]
    out.append(Claim(f"simulating {ranks['ranks']} ranks", ranks["wall_seconds"], 60, "s", at_least=False))
    return out


def run(scale: Scale, calibration: Path | None) -> dict[str, Any]:
    """Everything, printed on the way."""
    raw: dict[str, Any] = {"seed": SEED, "mix_scale": scale.mix, "calibration": str(calibration or "")}
    raw["papers"] = run_papers(scale, calibration)
    show_papers(raw["papers"])

    mix = workloads(replace(scale, synthetic_tokens=1))["mix"]
    model, cluster = model_of("qwen3-235b-a22b", "fp8"), hardware.cluster("h100", 8)
    raw["placements"] = {}
    for cache in (65_536, 131_072, 262_144):
        name = f"8xh100 fp8, {cache // 1024}K tokens of cache a rank"
        raw["placements"][name] = placements(model, cluster, mix, cache)
        show_named(f"Placement: {name}", raw["placements"][name])
    raw["ablations"] = ablations(model, cluster, mix[: len(mix) // 2])
    show_named("Ablations: 8xh100 fp8, half of the mix", raw["ablations"])

    raw["many_ranks"] = many_ranks(scale.ranks)
    console.print(
        f"{scale.ranks} ranks: {raw['many_ranks']['wall_seconds']:.1f} s for {raw['many_ranks']['requests']} requests"
    )
    raw["devices"] = over_devices([1, 2, 4, 8, 16, 32, 64, 128, 256, 512][:: 1 if scale.sweep > 5 else 3])
    by_name: dict[str, dict[str, Any]] = {}
    for row in raw["devices"]:
        by_name.setdefault(row["name"], {"tokens/s a device": row["name"]})[str(row["devices"])] = row["per_device"]
    show_rows("Devices: Qwen3-235B-A22B fp8, H200", list(by_name.values()))

    steps = [index / (scale.sweep - 1) for index in range(scale.sweep)]
    raw["links"] = {
        str(length): over_links(model, "h100", [1e9 * 1000**step for step in steps], length) for length in (512, 16_384)
    }
    for length, rows in raw["links"].items():
        show_rows(f"Links: 8xh100 fp8, prompts of {length} tokens, tokens/s", rows)
    raw["backlog"] = {
        str(length): over_backlog(model, "h100", [round(2_048 * 512**step) for step in steps], length)
        for length in (512,)
    }
    for length, rows in raw["backlog"].items():
        show_rows(f"Tokens under way: 8xh100 fp8, prompts of {length} tokens, tokens/s", rows)
    raw["assumptions"] = assumptions(model, "h100", mix[: len(mix) // 3])
    show_rows(
        "AsyncEP's lead if one assumption is another: 8xh100 fp8, a third of the mix",
        [{"": name, **leads} for name, leads in raw["assumptions"].items()],
    )
    raw["systems"] = {
        f"{devices} x H200, batches of {tokens}": three_systems(
            devices, tokens, with_amoe=devices <= 8 and (tokens > 2_048 or scale.sweep > 5)
        )
        for devices, tokens in ((8, 2_048), (8, 8_192), *(((32, 2_048), (32, 8_192)) if scale.sweep > 5 else ()))
    }
    for name, cases in raw["systems"].items():
        show_named(f"Three systems: {name}", cases)
    raw["slower_kernels"] = {
        f"8x{device} {dtype}": slower_kernels(model_of("qwen3-235b-a22b", dtype), hardware.cluster(device, 8), mix, mfu)
        for device, dtype in MACHINES
        for mfu in [sum(PAPER_MFU) / 2]
    }
    for name, found in raw["slower_kernels"].items():
        leads = {key: round(value, 2) for key, value in found["lead_in_steady_state"].items() if value}
        console.print(
            f"{name}: MFU {found['mfu']:.0%} if all kernels took {found['factor']:.2f} times as long; leads {leads}"
        )
    if calibration:
        measured = read_calibration(calibration)
        if measured.steps:
            small = measured.apply(hardware.cluster(measured.machine, 2))
            raw["comparison"] = [
                {
                    "strategy": one.step.strategy,
                    "measured": one.step.seconds,
                    "simulated": one.simulated,
                    "error": one.error,
                }
                for one in compare(model_of(measured.model, "bf16"), small, measured.steps, skew=measured.skew)
            ]
            show_rows("Simulated against measured", raw["comparison"])
    return raw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of everything, under a minute")
    parser.add_argument("--scale", type=float, help="share of the real mix's requests (default 0.3; quick: 0.03)")
    parser.add_argument(
        "--calibration", type=Path, help="measured figures of devices and links, see docs/internals/simulator.md"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the pictures of this record again, run nothing")
    options = parser.parse_args()
    if options.plot:
        for path in draw(json.loads(options.plot.read_text())["raw"], options.plot.parent):
            console.print(f"{path}")
        return
    scale = QUICK if options.quick else FULL
    if options.scale:
        scale = replace(scale, mix=options.scale)
    started = time.perf_counter()
    raw = run(scale, options.calibration)
    raw["bench_seconds"] = time.perf_counter() - started
    claims = claims_of(raw)
    table = Table("claim", "value", "wanted", "holds")
    for claim in claims:
        sign = ">=" if claim.at_least else "<="
        table.add_row(
            claim.name, f"{claim.value:.3g} {claim.unit}", f"{sign} {claim.wanted:g}", "yes" if claim.holds else "NO"
        )
    console.print(table)
    path = write("sim", seed=SEED, raw=raw, claims=claims)
    console.print(f"{path} ({raw['bench_seconds']:.0f} s)")
    for picture in draw(raw, path.parent):
        console.print(f"{picture}")


if __name__ == "__main__":
    main()
