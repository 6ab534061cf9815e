"""Weights or tokens, measured: `auto` beside AsyncEP, expert calls alone, TP, PP, EP and DP over one limited link.

    python bench/calls.py [--quick] [--sides NAME …] [--parts NAME …] [--factors F …] [--isa avx512_bf16] [--plot FILE]

Both hosts are one core each, joined by a link whose bytes a second are to a core's measured FLOPs a second what
NVLink's are to an H100's, times each of `--factors`. Every side serves prompts that come alone (`lone`), the paper's
mix, conversations and news at once (`loads`), and the mix in Poisson arrivals at 25, 50 and 80 % of AsyncEP's
throughput (`arrivals`); then prompts alone with wider experts (`wide`), and on one host (`one-host`). Writes
`bench/out/calls.json` and `bench/out/calls.png`, under 40 minutes. Needs root (network namespaces).
`docs/results/calls.md` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from calls_one_host import STARTS, one_host
from calls_tables import ARRIVALS, claims_of, plot, show
from emulation.two_hosts import Hosts, NoNamespacesError, two_hosts
from models import QWEN3_147M, QWEN3_TINY, random_qwen3
from paper import environment_of, say
from paper_loads import FULL, MIX, QUICK, make_loads, serve, serve_at, warm
from paper_run import BYTES_PER_FLOP, core_peak, flush
from paper_sides import ASYNCEP, CALLS, SIDES, Running, Side, running
from records import OUT, write
from rich.console import Console
from router_load import Load, difference

from asyncep_router.cost import ModelCost

SEED = 20261201
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
WIDE_LENGTHS = (256, 512, 1024)
# Prompts of a length that are timed.
REPEATS = 4
# Multiples of the H100's ratio; 4 and 13 are what 3 and 10 Gbit/s are to 0.76.
FACTORS = (1.0, 4.0, 13.0)
# Each load is served until so much time has passed, at least once.
LEAST_SECONDS = 20.0
# Experts four times as wide: a row computes four times as long, its bytes on the link stay the same.
WIDE = {**QWEN3_147M, "moe_intermediate_size": 1536}
ARRIVING = 20.0
PARTS = ("lone", "loads", "arrivals", "wide", "one-host")
OVER_LINKS = PARTS[:4]
# What the record has of the parts over links.
FOUND = ("lone", "wide", "loads", "arrivals", "calls", "differences", "failed")
NAMES = ("AsyncEP, one-sided", "ep", "auto", "TP-2", "PP-2", "EP-2", "DP-attention + EP-2", "DP-2, experts twice")
# Sides that serve `wide`: the others take time and are in no claim.
WIDE_NAMES = ("AsyncEP, one-sided", "auto", "TP-2", "PP-2")
ARRIVING_NAMES = tuple(name for name in NAMES if not name.startswith("DP"))
QUICK_NAMES = ("AsyncEP, one-sided", "auto")

_started = time.monotonic()


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny model, two sides: shows that it runs, not how fast")
    parser.add_argument("--sides", nargs="+", metavar="NAME", choices=NAMES, help=f"only these of {', '.join(NAMES)}")
    parser.add_argument("--parts", nargs="+", metavar="NAME", choices=PARTS, help=f"only these of {', '.join(PARTS)}")
    parser.add_argument("--factors", nargs="+", type=float, metavar="F", default=FACTORS, help="links, in that order")
    parser.add_argument("--isa", choices=("amx", "avx512_bf16"), help="instructions that products use; see bench-paper")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="show and draw this record again, run nothing")
    options = parser.parse_args(arguments)
    if min(options.factors) <= 0:
        parser.error("--factors must be above 0")
    parts, names = options.parts or PARTS, options.sides or NAMES
    if "arrivals" in parts and not ("loads" in parts and ASYNCEP.name in names):
        parser.error(
            f"--parts arrivals: their rate is a share of {ASYNCEP.name}'s throughput; ask for it and for loads"
        )
    return options


def lone(
    url: str, lengths: Sequence[int], repeats: int, vocabulary: int, seed: int = SEED
) -> tuple[dict[str, list[float]], list[Any]]:
    """Seconds of prompts that come one after the other, by length, and the log-probabilities of all.

    Random tokens, the same for every side with the same seed. One more of each length is not timed.
    """
    seconds: dict[str, list[float]] = {}
    answers: list[Any] = []
    with httpx.Client(timeout=600) as client:
        for tokens in lengths:
            numbers = random.Random(f"{seed}/{tokens}")
            for turn in range(repeats + 1):
                body = {
                    "input_ids": [numbers.randrange(3, vocabulary) for _ in range(tokens)],
                    "sampling_params": {"max_new_tokens": 0},
                    "return_logprob": True,
                    "token_ids_logprob": [3, 4, 5],
                }
                began = time.perf_counter()
                answer = client.post(f"{url}/generate", json=body)
                took = time.perf_counter() - began
                answer.raise_for_status()
                if turn:
                    seconds.setdefault(str(tokens), []).append(took)
                    answers.append(answer.json()["meta_info"]["output_token_ids_logprobs"][0])
    return seconds, answers


class Bench:
    """All runs, and what they found so far.

    Args:
        hosts: the emulated ones.
        rates: of the link, as tc writes them, by factor.
        environment: of every server.
        quick: little of everything.
    """

    def __init__(self, hosts: Hosts, rates: Mapping[float, str], environment: Mapping[str, str], quick: bool) -> None:
        self._hosts, self._rates, self._environment, self._quick = hosts, rates, environment, quick
        self._served: dict[str, Any] = {}
        self._alone: dict[str, list[Any]] = {}
        self.raw: dict[str, Any] = {found: {} for found in FOUND}

    def side(self, side: Side, parts: Sequence[str], model: Path, loads: Sequence[Load], vocabulary: int) -> None:
        """Starts a side and asks it for what is wanted of it. One that fails is noted."""
        say(f"{side.name}: starting")
        first = next(iter(self._rates.values()))
        self._hosts.limit(first)
        try:
            with running(side, self._hosts, model, self._environment) as server:
                if "wide" in parts:
                    self._lone(side, server, "wide", WIDE_LENGTHS, vocabulary)
                if "lone" in parts:
                    self._lone(side, server, "lone", LENGTHS[:3] if self._quick else LENGTHS, vocabulary)
                    self._hosts.limit(first)
                for load in loads if "loads" in parts else ():
                    self._load(side, server, load)
                if "arrivals" in parts and (side.name in ARRIVING_NAMES):
                    self._arrivals(side, server, next(load for load in loads if load.name == MIX))
                if side.group:
                    found = [httpx.get(f"{url}/asyncep/status", timeout=30).json() for url in server.members]
                    self.raw["calls"].setdefault(side.name, []).append([one["calls"] for one in found])
        except Exception as error:
            traceback.print_exc()
            self.raw["failed"][side.name] = f"{type(error).__name__}: {error}"
            say(f"{side.name} has no figures (any more): {error}")

    def _lone(self, side: Side, server: Running, part: str, lengths: Sequence[int], vocabulary: int) -> None:
        url = server.members[0] if server.members else server.url
        for factor, rate in self._rates.items():
            self._hosts.limit(rate)
            # AsyncEP and auto learn the link's speed from batches that gather: two prompts of 6,000 tokens.
            flush(server)
            lone(url, (64,) if self._quick else (64, 6000), 1, vocabulary, seed=-SEED)
            flush(server)
            seconds, answers = lone(url, lengths, 2 if self._quick else REPEATS, vocabulary)
            self.raw[part].setdefault(f"{factor:g}", {})[side.name] = seconds
            if part == "lone" and side.group:
                self._alone[f"{side.name} at {factor:g}"] = answers
            medians = ", ".join(f"{tokens}: {statistics.median(each) * 1e3:.0f}" for tokens, each in seconds.items())
            say(f"  {side.name}, {part}, link x{factor:g}: ms {medians}")
        self._note_bits()

    def _load(self, side: Side, server: Running, load: Load) -> None:
        warm(server.url, load, 0.2)
        rounds: list[dict[str, Any]] = []
        began = time.monotonic()
        while not rounds or (time.monotonic() - began < LEAST_SECONDS and not self._quick):
            flush(server)
            answers = serve(server.url, load)
            figures = answers.figures(load, 2)
            rounds.append({key: figures[key] for key in ("tokens_per_s", "requests_per_s")})
            other = self._served.setdefault(load.name, answers)
            if other is not answers:
                self.raw["differences"].setdefault(load.name, {})[side.name] = difference(other, answers)
        self.raw["loads"].setdefault(load.name, {})[side.name] = rounds
        say(f"  {side.name}, {load.name}: {[round(one['tokens_per_s']) for one in rounds]} tokens/s")

    def _arrivals(self, side: Side, server: Running, mix: Load) -> None:
        ours = self.raw["loads"].get(mix.name, {}).get(ASYNCEP.name)
        if not ours:
            raise RuntimeError("arrivals are shares of AsyncEP's throughput, which has none")
        whole = self.raw["whole"] = statistics.median(one["requests_per_s"] for one in ours)
        for share in ARRIVALS:
            flush(server)
            rate = share * whole
            bodies = [mix.bodies[number % len(mix.bodies)] for number in range(round(rate * ARRIVING))]
            seconds = serve_at(server.url, bodies, rate, seed=1)
            self.raw["arrivals"].setdefault(side.name, {})[f"{share:g}"] = {"rate": rate, "seconds": seconds}
            say(f"  {side.name}, {share:.0%}: median {statistics.median(seconds):.2f} s")

    def _note_bits(self) -> None:
        """Prompts alone: how many of the sides that compute rows by themselves differ from the first one's."""
        if self._alone:
            first, *others = self._alone.values()
            self.raw["bits"] = {
                "answers": sum(len(one) for one in others),
                "different": sum(mine != theirs for one in others for mine, theirs in zip(first, one, strict=True)),
            }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs everything; the record's raw part. Written down after each side, so that a later failure loses nothing.

    Raises:
        NoNamespacesError: not on this machine.
    """
    quick: bool = options.quick
    environment = environment_of(options.isa)
    peak = core_peak(environment)
    factors = options.factors[:1] if quick else options.factors
    rates = {factor: f"{round(peak * BYTES_PER_FLOP * 8 / 1e6 * factor)}mbit" for factor in factors}
    say(f"a core's peak is {peak / 1e9:.0f} GFLOP/s; links are {', '.join(rates.values())} a direction")
    config = QWEN3_TINY if quick else QWEN3_147M
    model = random_qwen3("qwen3-tiny" if quick else "qwen3-147m", config)
    cost = ModelCost.from_config({"model_type": "qwen3_moe", **config})
    loads = make_loads(QUICK if quick else FULL, cost, config["vocab_size"], SEED, None)
    loads = [load for load in loads if load.name == MIX or load.name.startswith(("conversations", "news"))]
    parts = options.parts or (("lone", "loads", "one-host") if quick else PARTS)
    names = options.sides or (QUICK_NAMES if quick else NAMES)
    sides = {side.name: side for side in (*SIDES, *CALLS)}
    raw: dict[str, Any] = {
        "links": rates,
        "isa": options.isa or "best",
        "core_peak_flops": peak,
        "sides": [asdict(sides[name]) for name in NAMES if name in names],
        "about": {load.name: load.about() for load in loads},
        **{found: {} for found in FOUND},
    }
    if "one-host" in parts:
        say("one host")
        raw["one host"] = one_host(
            model,
            lambda url: lone(url, LENGTHS[:3] if quick else LENGTHS, 2 if quick else REPEATS, config["vocab_size"]),
            environment,
            starts=1 if quick else STARTS,
            say=say,
        )
        _save(raw, quick)
    base = [part for part in parts if part in OVER_LINKS and part != "wide"]
    with two_hosts(next(iter(rates.values()))) if base or "wide" in parts else nullcontext() as hosts:
        if hosts is None:
            return raw | {"seconds": time.monotonic() - _started}
        bench = Bench(hosts, rates, environment, quick)
        for name in (name for name in NAMES if name in names and base):
            bench.side(sides[name], base, model, loads, config["vocab_size"])
            raw |= bench.raw
            _save(raw, quick)
        if "wide" in parts:
            wide = model if quick else random_qwen3("qwen3-147m-wide", WIDE)
            for name in (name for name in WIDE_NAMES if name in names):
                bench.side(sides[name], ["wide"], wide, (), config["vocab_size"])
                raw |= bench.raw
    raw["seconds"] = time.monotonic() - _started
    return raw


def _save(raw: dict[str, Any], quick: bool) -> Path:
    path = OUT / "calls-quick.json" if quick else None
    return write("calls", seed=SEED, raw=raw, claims=claims_of(raw), path=path)


def main() -> int:
    """Runs the bench; 0, or 3 where hosts cannot be emulated."""
    options = options_of()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.plot:
        raw = json.loads(options.plot.read_text())["raw"]
        show(console, raw, claims_of(raw))
        plot(raw, options.plot.with_suffix(".png"))
        return 0
    try:
        raw = measure(options)
    except NoNamespacesError as error:
        console.print(f"bench-calls needs emulated hosts: {error}")
        return 3
    path = _save(raw, options.quick)
    show(console, raw, claims_of(raw))
    plot(raw, path.with_suffix(".png"))
    console.print(f"{path} ({raw['seconds']:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
