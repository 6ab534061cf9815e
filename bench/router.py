"""Routers in front of the same two ranks, with real requests: ours, SGLang's own dispatch, and the Rust sglang_router.

    python bench/router.py [--quick] [--rounds N] [--trace FILE --scale S --keep K] [--peer DIR] [--all]

Each side serves a few-shot mix, long inputs with single outputs, and a trace (Mooncake's .jsonl or Azure's .csv;
without one, generated conversations). Sides take turns; a round starts every server anew and empties the caches before
every load. Compared are throughput, latency, cached tokens, FLOPs against the bound in which what prompts share is
computed once, and how evenly FLOPs lie on the ranks. `--peer` is an environment made by `scripts/peer_router.sh DIR`.
`--all` first runs the benches of what a decision and a request through each router cost, and takes their figures in.
Writes `bench/out/router.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models import QWEN3_147M, QWEN3_TINY, random_qwen3
from peer_start import flush_cache
from records import OUT, Claim, write
from rich.console import Console
from rich.table import Table
from router_load import Answers, Load, difference, make_loads, send
from router_sides import PAGE, RANKS, SIDES, Side, Workers, engine, peer_python, peer_version, router
from router_simulated import PAPER, frontend_gain

from asyncep_router.cost import ModelCost

SEED = 20261123
# The claims are about these; the others are measured in the first round only.
EVERY_ROUND = ("asyncep", "sglang round_robin (default)", "sglang_router cache_aware", "asyncep http")
OURS, HTTP, DEFAULT, RUST = EVERY_ROUND[0], EVERY_ROUND[3], EVERY_ROUND[1], EVERY_ROUND[2]
WARM_UP = 0.2  # share of each load
PARTS = ("router_decide", "router_inside", "router_http")  # benches that --all takes in
Raw = dict[str, dict[str, list[dict[str, Any]]]]

_started = time.monotonic()


def progress(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", file=sys.stderr, flush=True)


def chosen(names: Sequence[str] | None, peer: Path | None, peer_directory: Path) -> tuple[list[Side], list[str]]:
    """The sides to run, and the reasons for those left out.

    Raises:
        SystemExit: a side nobody knows.
    """
    sides = [side for side in SIDES if names is None or side.name in names]
    if unknown := set(names or ()) - {side.name for side in SIDES}:
        raise SystemExit(f"--sides {', '.join(unknown)}: known are {', '.join(side.name for side in SIDES)}")
    if peer is None and any(side.router == "rust" for side in sides):
        reason = f"no sglang_router in {peer_directory}: run scripts/peer_router.sh {peer_directory}"
        return [side for side in sides if side.router != "rust"], [reason]
    return sides, []


class Measurement:
    """Serves every load by every side, round after round."""

    def __init__(self, model: str, loads: Sequence[Load], peer: Path | None) -> None:
        self.model, self.loads, self.peer = model, loads, peer
        self.raw: Raw = {}
        self.seconds: dict[str, list[float]] = {}
        self.answers: dict[str, dict[str, Answers]] = {}

    def round(self, sides: Sequence[Side], number: int) -> None:
        """Every side once. The order turns, so that a machine that slows down hits all alike."""
        engines = [side for side in sides if side.router is None]
        routers = [side for side in sides if side.router is not None]
        groups: list[list[Side]] = [[side] for side in engines]
        if routers:
            groups.append(routers[number % len(routers) :] + routers[: number % len(routers)])
        for group in groups[number % len(groups) :] + groups[: number % len(groups)]:
            if group[0].router is None:
                with self.timed("engine's start and stop"), engine(self.model, group[0]) as url:
                    self.warm_up([url])
                    self.serve(group[0], url)
                continue
            with self.timed("workers' start and stop"), Workers(self.model) as workers:
                self.warm_up(workers.urls)
                for side in group:
                    workers.flush()
                    with router(side, workers.urls, self.peer) as url:
                        self.serve(side, url, workers)

    def warm_up(self, urls: Sequence[str]) -> None:
        """oneDNN compiles a kernel for each new shape; a part of each load shows it most of them."""

        async def everywhere(load: Load) -> None:
            await asyncio.gather(*(send(url, load, WARM_UP / len(urls)) for url in urls))

        with self.timed("warming up"):
            for load in self.loads:
                asyncio.run(everywhere(load))

    def serve(self, side: Side, url: str, workers: Workers | None = None) -> None:
        """Every load once, each on empty caches."""
        for load in self.loads:
            with self.timed(side.name):
                if workers is None or side.router == "ours":
                    flush_cache(url)
                else:
                    # A fresh router knows nothing of earlier loads, and theirs share nothing with this one.
                    workers.flush()
                answers = asyncio.run(send(url, load))
            figures = answers.figures(load, RANKS)
            self.raw.setdefault(load.name, {}).setdefault(side.name, []).append(figures)
            self.answers.setdefault(load.name, {}).setdefault(side.name, answers)
            progress(
                f"  {side.name}, {load.name}: {figures['requests_per_s']:.1f} requests/s, "
                f"{figures['flops_ratio']:.3f} x the bound"
            )

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a part to the list of such parts, less those of parts inside it."""
        began, before = time.monotonic(), sum(sum(each) for each in self.seconds.values())
        yield
        inside = sum(sum(each) for each in self.seconds.values()) - before
        self.seconds.setdefault(name, []).append(time.monotonic() - began - inside)

    def differences(self) -> dict[str, dict[str, dict[str, float]]]:
        """Log-probabilities of each side against those of the first, by load."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for load, by_side in self.answers.items():
            (_, first), *others = by_side.items()
            found[load] = {name: difference(first, answers) for name, answers in others}
        return found


FIGURES = (
    "requests_per_s",
    "requests_per_processor_s",
    "p50_s",
    "p99_s",
    "cached_share",
    "flops_ratio",
    "prefix_ratio",
    "imbalance",
)


def summarize(raw: Raw) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """load -> side -> figure -> median, min, max over rounds."""
    return {
        load: {
            side: {
                name: {
                    "median": statistics.median(run[name] for run in runs),
                    "min": min(run[name] for run in runs),
                    "max": max(run[name] for run in runs),
                }
                for name in FIGURES
            }
            for side, runs in by_side.items()
        }
        for load, by_side in raw.items()
    }


def show(console: Console, loads: Sequence[Load], summary: dict[str, Any], raw: Raw) -> None:
    """One table a load."""
    for load in loads:
        about = load.about()
        size = f"{about['requests']} requests, {about['clients']} clients"
        title = f"{load.name}: {size}; medians (least, most); FLOPs over their bounds"
        table = Table(title=title)
        columns = ("starts", "requests/s", "per CPU s", "p50 s", "p99 s", "cached", "FLOPs", "prefixes", "imbalance")
        for column in ("side", *columns):
            table.add_column(column, justify="left" if column == "side" else "right")
        for side, row in summary[load.name].items():
            rate = row["requests_per_s"]
            rest = [f"{row[name]['median']:.3f}" for name in FIGURES[1:]]
            starts = str(len(raw[load.name][side]))
            table.add_row(side, starts, f"{rate['median']:.1f} ({rate['min']:.1f}, {rate['max']:.1f})", *rest)
        console.print(table)


def ratio_by_round(raw: Raw, load: str, ours: str, other: str) -> float | None:
    """Median over rounds of our requests/s over another side's of the same round; None if one was not run."""
    pairs = zip(raw[load].get(ours, []), raw[load].get(other, []), strict=False)
    ratios = [one["requests_per_s"] / two["requests_per_s"] for one, two in pairs]
    return statistics.median(ratios) if ratios else None


def claims_of(raw: Raw, summary: dict[str, Any], differences: dict[str, Any], trace: str) -> list[Claim]:
    """What the router is to show, of the sides that were run."""
    few, long = "few-shot mix", "long inputs"
    claims = []
    for ours, other, wanted in ((OURS, DEFAULT, 1.25), (OURS, RUST, 1.10), (HTTP, RUST, 1.10)):
        ratio = ratio_by_round(raw, few, ours, other)
        if ratio is not None:
            claims.append(Claim(f"requests/s of {ours} over {other}, {few}", ratio, wanted, "ratio"))
    for ours in (OURS, HTTP):
        if ours not in summary[few]:
            continue
        row = summary[few][ours]
        name = f"FLOPs inside shared prefixes over computing each once, {ours}, {few}"
        claims.append(Claim(name, row["prefix_ratio"]["median"], 1.10, "ratio", at_least=False))
        name = f"all FLOPs over computing each shared prefix once, {ours}, {few}"
        claims.append(Claim(name, row["flops_ratio"]["median"], 1.10, "ratio", at_least=False))
        if not math.isnan(over := summary[trace][ours]["prefix_ratio"]["median"]):
            name = f"FLOPs inside shared prefixes over computing each once, {ours}, {trace}"
            claims.append(Claim(name, over, 1.10, "ratio", at_least=False))
        name = f"FLOPs of the busier rank over the mean, {ours}, {long}"
        claims.append(Claim(name, summary[long][ours]["imbalance"]["median"], 1.05, "ratio", at_least=False))
    for load, by_side in differences.items():
        if by_side:
            # Rounding to bf16 in another order, as batches of other sizes do, is a small part of what differs
            # between one prompt's answer and another's.
            worst = max(found["mean"] / found["between_prompts"] for found in by_side.values())
            name = f"two sides' answers to a prompt apart, over two prompts' answers apart, {load}"
            claims.append(Claim(name, worst, 0.1, "ratio", at_least=False))
    return claims


def run_part(name: str, quick: bool, peer: Path | None) -> dict[str, Any]:
    """Another bench as a process of its own, and the record it wrote; {"failed": reason} if it wrote none."""
    script = Path(__file__).parent / f"{name}.py"
    if not script.exists():
        return {"failed": f"{script.name} is not there"}
    began = time.time()
    command = [sys.executable, str(script), *(["--quick"] if quick else [])]
    if name == "router_http" and peer:
        # On the same machine, one after the other.
        command += ["--peer", str(peer)]
    status = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    for path in (OUT / f"{name}-quick.json", OUT / f"{name}.json"):
        if path.exists() and path.stat().st_mtime >= began - 1:
            return {"seconds": time.time() - began, **json.loads(path.read_text())}
    return {"failed": f"status {status}, nothing written"}


def claims_of_part(name: str, record: dict[str, Any]) -> list[Claim]:
    """The claims in another bench's record, under its name."""
    return [
        Claim(f"{name}: {each['name']}", each["value"], each["wanted"], each["unit"], each["at_least"])
        for each in record.get("claims", ())
    ]


def without_nan(value: Any) -> Any:
    """JSON has no nan; what was not defined (a ratio over nothing shared) becomes null."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model, one round: shows that it runs, not how fast")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts of each side in the claims (3)")
    parser.add_argument("--sides", nargs="+", metavar="NAME", help="only these, each in every round")
    parser.add_argument(
        "--peer", type=Path, default=root / "build" / "peer-router", metavar="DIR", help="sglang_router"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake .jsonl or Azure .csv (default: generated)")
    parser.add_argument(
        "--scale", type=float, default=1 / 16, metavar="S", help="the trace's lengths times this (1/16)"
    )
    parser.add_argument(
        "--keep", type=float, default=0.01, metavar="K", help="share of its sessions that is kept (0.01)"
    )
    parser.add_argument("--all", action="store_true", help="also what decisions and requests through routers cost")
    options = parser.parse_args(arguments)
    if options.trace is not None and not options.trace.is_file():
        parser.error(f"--trace {options.trace}: no such file")
    if options.scale <= 0 or not 0 < options.keep <= 1 or options.rounds < 1:
        parser.error("--scale must be above 0, --keep above 0 and at most 1, --rounds at least 1")
    return options


def main() -> int:
    """Runs the bench; returns 0."""
    options = options_of()
    quick: bool = options.quick
    # Wide enough for the tables also where no terminal says how wide it is.
    console = Console(width=None if sys.stdout.isatty() else 150)
    peer = peer_python(options.peer)
    sides, left_out = chosen(options.sides, peer, options.peer)
    for reason in left_out:
        console.print(f"left out: {reason}")
    parts = {}
    for name in PARTS if options.all else ():
        progress(f"bench/{name}.py")
        parts[name] = run_part(name, quick, peer)
        if "failed" in parts[name]:
            console.print(f"left out: bench/{name}.py: {parts[name]['failed']}")

    progress("simulated gain over a default scheduler")
    requests = 600 if quick else 4000
    simulated = [frontend_gain(ranks, requests=requests, seed=6) for ranks in (2, 8)]

    config = QWEN3_TINY if quick else QWEN3_147M
    cost = ModelCost.from_config({"model_type": "qwen3_moe", **config})
    model = str(random_qwen3("qwen3-tiny" if quick else "qwen3-147m", config))
    loads = make_loads(
        cost,
        vocabulary=config["vocab_size"],
        page=PAGE,
        seed=SEED,
        quick=quick,
        trace=options.trace,
        scale=options.scale / 8 if quick else options.scale,
        keep=options.keep,
    )
    measurement = Measurement(model, loads, peer)
    rounds = 1 if quick else options.rounds
    for number in range(rounds):
        of_round = [side for side in sides if number == 0 or options.sides or side.name in EVERY_ROUND]
        progress(f"round {number + 1} of {rounds}: {', '.join(side.name for side in of_round)}")
        measurement.round(of_round, number)

    raw = measurement.raw
    summary, differences = summarize(raw), measurement.differences()
    show(console, loads, summary, raw)
    claims = claims_of(raw, summary, differences, loads[-1].name)
    for row in simulated:
        console.print(
            f"simulated, AsyncEP's T, {row['ranks']} ranks: the policy adds {row['gain']:.1%} to a default scheduler"
            f" (the paper: {PAPER[0]:.0%} to {PAPER[1]:.0%})"
        )
    name = f"gain over a default scheduler, simulated, {simulated[-1]['ranks']} ranks"
    claims.append(Claim(name, simulated[-1]["gain"], PAPER[0], "share"))
    for part, found in parts.items():
        claims += claims_of_part(part, found)
    for claim in claims:
        console.print(
            f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.4g}"
            f" (wanted {'>=' if claim.at_least else '<='} {claim.wanted})"
        )
    record = {
        "loads": {load.name: load.about() for load in loads},
        "trace": None
        if options.trace is None
        else {"file": options.trace.name, "scale": options.scale, "keep": options.keep},
        "sglang_router": peer_version(peer) if peer else None,
        "left_out": left_out,
        "runs": raw,
        "summary": summary,
        "log_probability_differences": differences,
        "simulated": {"paper": PAPER, "runs": simulated},
        "seconds": measurement.seconds,
        "parts": parts,
    }
    for what, seconds in measurement.seconds.items():
        progress(f"{what}: {sum(seconds):.0f} s in {len(seconds)} parts")
    print(write("router-quick" if quick else "router", seed=SEED, raw=without_nan(record), claims=claims))
    return 0


if __name__ == "__main__":
    sys.exit(main())
