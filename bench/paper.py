"""The paper's comparison, run: AsyncEP beside TP, PP, EP and DP over one limited link between two emulated hosts.

    python bench/paper.py [--quick] [--rounds N] [--rate 5470mbit] [--isa avx512_bf16] [--trace FILE]
                          [--sides NAME …] [--loads NAME …] [--no-ablation] [--objective SECONDS] [--plot FILE]

Both hosts are one core each, joined by a link whose bytes a second are to a core's measured FLOPs a second what
NVLink's are to an H100's. Every layout serves the paper's mix, its four lengths (both made smaller), a trace and real
text; they take turns, each round starts every server anew. Then AsyncEP with one thing changed at a time; and the
simulator, fitted to replicated ranks alone, is held against everybody's steps. Writes `bench/out/paper.json`,
`bench/out/paper-calibration.json` (for `bench/sim.py --calibration`) and `bench/out/paper.png`, under an hour.
Needs root (network namespaces). `docs/results/paper.md` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from emulation.two_hosts import NoNamespacesError, two_hosts
from models import QWEN3_147M, QWEN3_TINY, random_qwen3
from paper_fit import FITTED, calibrate, compared, steps_of, write_calibration
from paper_loads import FULL, LONG, MIX, QUICK, make_loads
from paper_run import BYTES_PER_FLOP, Bench, core_peak
from paper_sides import ASYNCEP, SIDES, variants
from paper_tables import claims_of, plot, show
from records import OUT, write
from rich.console import Console
from router_load import difference

from asyncep_router.cost import ModelCost

SEED = 20261125
# Tokens of the prompts whose steps are timed.
STEPS = (128, 256, 512, 1024, 2048, 4096)
LATENCY_SECONDS = 1e-4
QUICK_SIDES = (ASYNCEP.name, "PP-2")

_started = time.monotonic()


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model, two sides: shows that it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="starts of each side (2)")
    parser.add_argument("--rate", help="of the link in each direction, as tc writes it (default: from the core's peak)")
    parser.add_argument(
        "--isa",
        choices=("amx", "avx512_bf16"),
        help="instructions that products use; avx512_bf16 makes a core with AMX slower, so that copying what comes "
        "over the link takes less of it (default: the best there is)",
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake .jsonl or Azure .csv (default: generated)")
    parser.add_argument("--sides", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--loads", nargs="+", metavar="NAME", help="only these; claims are about mix and long")
    parser.add_argument("--no-ablation", action="store_true", help="leave out AsyncEP's variants")
    parser.add_argument("--objective", type=float, default=4.0, metavar="S", help="latency that counts as good (4)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="show and draw this record again, run nothing")
    options = parser.parse_args(arguments)
    if options.trace is not None and not options.trace.is_file():
        parser.error(f"--trace {options.trace}: no such file")
    if options.rounds < 1 or options.objective <= 0:
        parser.error("--rounds must be at least 1, --objective above 0")
    if unknown := set(options.sides or ()) - {side.name for side in SIDES}:
        parser.error(f"--sides {', '.join(unknown)}: known are {', '.join(side.name for side in SIDES)}")
    return options


def environment_of(isa: str | None) -> dict[str, str]:
    """What every server and the peak's measurement have of their own: one thread, and the instructions asked for."""
    if isa != "avx512_bf16":
        return {"OMP_NUM_THREADS": "1"}
    return {"OMP_NUM_THREADS": "1", "ASYNCEP_CPU_ISA": isa, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the record's raw part. Written down after each round, so that a later failure loses nothing.

    Raises:
        NoNamespacesError: not on this machine.
    """
    quick: bool = options.quick
    environment = environment_of(options.isa)
    peak = core_peak(environment)
    rate = options.rate or f"{round(peak * BYTES_PER_FLOP * 8 / 1e6)}mbit"
    say(f"a core's peak is {peak / 1e9:.0f} GFLOP/s; the link is {rate} a direction")
    config = QWEN3_TINY if quick else QWEN3_147M
    model = random_qwen3("qwen3-tiny" if quick else "qwen3-147m", config)
    cost = ModelCost.from_config({"model_type": "qwen3_moe", **config})
    size = QUICK if quick else FULL
    loads = make_loads(size, cost, config["vocab_size"], SEED, options.trace)
    if options.loads:
        loads = [load for load in loads if load.name in options.loads]
    names = options.sides or (QUICK_SIDES if quick else [side.name for side in SIDES])
    sides = [side for side in SIDES if side.name in names]
    raw: dict[str, Any] = {
        "link": rate,
        "isa": options.isa or "best",
        "core_peak_flops": peak,
        "objective_s": options.objective,
        "loads": {load.name: load.about() for load in loads},
        "sides": [asdict(side) for side in sides],
    }
    with two_hosts(rate) as hosts:
        bench = Bench(
            hosts, model, environment, loads,
            warm_share=0.2,
            rates=() if quick else (0.5, 0.8),
            steps=(64, 128, 256) if quick else STEPS,
            step_count=2 if quick else 5,
            say=say,
        )  # fmt: skip
        for number in range(1 if quick else options.rounds):
            # What claims are about is served in every round, the rest in the first; stock kernels, which take
            # several times as long, serve it in the first alone.
            claimed = [load for load in loads if load.name in (MIX, LONG)]
            turn = number % len(sides)
            for side in sides[turn:] + sides[:turn]:
                if side.kernels == "sglang" and number > 0:
                    continue
                everything = number == 0 and not quick and side.kernels == "ours"
                bench.side(side, loads if everything else claimed, extras=number == 0)
                _note(raw, bench)
                _save(raw, quick)
        served = ASYNCEP.name in raw["runs"].get(MIX, {})
        if served and not options.no_ablation:
            mix = next(load for load in loads if load.name == MIX)
            changed = variants(_threshold_tokens(bench, cost))
            if quick:
                changed = [side for side in changed if side.router or side.name == "unchanged"][:2]
            bench.ablations(changed, mix, rounds=1)
            _note(raw, bench)
    raw["calibration"] = None if quick else _calibration(raw, bench)
    raw["seconds"] = time.monotonic() - _started
    return raw


def _threshold_tokens(bench: Bench, cost: ModelCost) -> int:
    """T as AsyncEP measured it, in tokens of the mix's mean prompt."""
    layer_flops = max(report["threshold_flops"] or 0.0 for report in bench.reports[ASYNCEP.name])
    about = next(load for load in bench.loads if load.name == MIX).about()
    mean = max(1, about["tokens"] // about["requests"])
    return max(1, int(cost.threshold_flops(layer_flops) / cost.flops(mean) * mean))


def _note(raw: dict[str, Any], bench: Bench) -> None:
    raw |= {
        "runs": bench.raw,
        "steps": bench.timed,
        "latencies": bench.latencies,
        "reports": bench.reports,
        "expert_bytes": bench.expert_bytes,
        "ablation": bench.ablation,
        "failed": bench.failed,
        "differences": {
            load: {name: difference(by_side[first], answers) for name, answers in by_side.items() if name != first}
            for load, by_side in bench.answers.items()
            for first in [next(iter(by_side))]
            if len(by_side) > 1
        },
    }


def _calibration(raw: dict[str, Any], bench: Bench) -> list[dict[str, Any]] | None:
    """Fits, writes the file, and returns simulated beside measured steps; None where a side it needs has no steps."""
    strategies = {side.name: side.strategy for side in SIDES if side.kernels == "ours"}
    steps = steps_of(bench.timed, strategies)
    reports = bench.reports.get(ASYNCEP.name)
    if not reports or sum(step.strategy == FITTED for step in steps) < 3:
        say("no calibration: it needs AsyncEP's gathers and the steps of DP-2")
        return None
    # As gathers reach it: headers and the reader's own work are in it.
    bandwidth = sum(report["bytes_per_layer"] / report["seconds"] for report in reports) / len(reports)
    contents = calibrate(steps, raw["core_peak_flops"], bandwidth, LATENCY_SECONDS)
    path = write_calibration(OUT / "paper-calibration.json", contents)
    say(f"written: {path}")
    return [
        {
            "strategy": one.step.strategy,
            "tokens": one.step.passes[0][0],
            "measured": one.step.seconds,
            "simulated": one.simulated,
            "error": one.error,
        }
        for one in compared(path)
    ]


def _save(raw: dict[str, Any], quick: bool) -> Path:
    path = OUT / "paper-quick.json" if quick else None
    return write("paper", seed=SEED, raw=raw, claims=claims_of(raw), path=path)


def main() -> int:
    """Runs the bench; 0, or 3 where hosts cannot be emulated."""
    options = options_of()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.plot:
        raw = json.loads(options.plot.read_text())["raw"]
        show(console, raw, claims_of(raw))
        console.print(f"{plot(raw, options.plot.with_suffix('.png'))}")
        return 0
    try:
        raw = measure(options)
    except NoNamespacesError as error:
        console.print(f"bench-paper needs emulated hosts: {error}")
        return 3
    path = _save(raw, options.quick)
    show(console, raw, claims_of(raw))
    console.print(f"{path}, {plot(raw, path.with_suffix('.png'))} ({raw['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
