"""Runs of bench/paper.py: a side is started, warmed, given its loads, and what it did is noted. No judgements."""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from emulation.group import GroupServer, group
from emulation.two_hosts import Hosts
from paper_loads import MIX, serve, serve_at, steady_seconds, warm
from paper_sides import ASYNCEP, Running, Side, running, server_flags
from peer_start import flush_cache
from router_load import Answers, Load
from router_sides import Side as RouterSide
from router_sides import router

# An H100's: 450 GB/s a direction on NVLink over 990 TFLOP/s of dense bf16.
BYTES_PER_FLOP = 450e9 / 990e12
# Prompts of the mix that come in Poisson times.
TIMED_PROMPTS = 400
_PEAK = "import torch; from asyncep_sgl.experts.gather.peak import gemm_flops_per_second as f; print(f(torch.bfloat16))"


def core_peak(environment: Mapping[str, str]) -> float:
    """FLOPs a second of a large bf16 product on one core: the best of three processes, one at a time."""
    core = min(psutil.Process().cpu_affinity() or [0])
    command = ["taskset", "-c", str(core), sys.executable, "-c", _PEAK]
    found = []
    for _ in range(3):
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
        found.append(float(done.stdout.split()[-1]))
    return max(found)


@dataclass
class Bench:
    """What all runs share, and what they found so far.

    Attributes:
        rates: requests a second at which latency is looked at, as shares of AsyncEP's throughput on the mix.
        steps: tokens of the prompts whose steady steps are timed, and how many of each.
        raw: load -> side -> one entry a round.
        answers: load -> side -> the first round's.
        failed: side -> why it has no figures.
    """

    hosts: Hosts
    model: Path
    environment: Mapping[str, str]
    loads: Sequence[Load]
    warm_share: float
    rates: Sequence[float]
    steps: Sequence[int]
    step_count: int
    say: Callable[[str], None]
    raw: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    answers: dict[str, dict[str, Answers]] = field(default_factory=dict)
    timed: dict[str, dict[str, float]] = field(default_factory=dict)
    latencies: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    expert_bytes: dict[str, list[int]] = field(default_factory=dict)
    ablation: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def side(self, side: Side, loads: Sequence[Load], *, extras: bool) -> None:
        """Starts a side and serves it the loads; with `extras` steps and latencies too. A side that fails is noted."""
        self.say(f"{side.name}: starting")
        try:
            with running(side, self.hosts, self.model, self.environment) as server:
                for load in loads:
                    warm(server.url, load, self.warm_share)
                for load in loads:
                    figures, answers = self._serve(server, load)
                    self.raw.setdefault(load.name, {}).setdefault(side.name, []).append(figures)
                    self.answers.setdefault(load.name, {}).setdefault(side.name, answers)
                    self.say(f"  {side.name}, {load.name}: {figures['tokens_per_s']:,.0f} tokens/s")
                if not side.spanning:
                    state = [httpx.get(f"{url}/asyncep/status", timeout=30).json() for url in server.members]
                    self.reports[side.name] = [report for one in state for report in one["gathers"]]
                    self.expert_bytes[side.name] = [one["expert_bytes"] for one in state]
                if extras and side.kernels == "ours":
                    self._steps(side, server)
                    self._latencies(side, server)
        except Exception as error:
            traceback.print_exc()
            self.failed[side.name] = f"{type(error).__name__}: {error}"
            self.say(f"{side.name} has no figures (any more): {error}")

    def ablations(self, sides: Sequence[Side], load: Load, rounds: int) -> None:
        """AsyncEP's variants on one load. Those that differ in the router alone share their servers."""
        by_flags: dict[tuple[str, ...], list[Side]] = {}
        for side in sides:
            by_flags.setdefault(side.flags, []).append(side)
        for group_of in by_flags.values():
            flags = server_flags(group_of[0])
            self.say(f"ablation: {', '.join(side.name for side in group_of)}")
            try:
                with group(self.hosts, self.model, *flags, environment=self.environment) as servers:
                    urls = [server.url for server in servers]
                    for number in range(rounds):
                        # The order turns, as that of the sides does.
                        for side in group_of[number % len(group_of) :] + group_of[: number % len(group_of)]:
                            with router(RouterSide(side.name, side.router, "ours"), urls, None) as url:
                                running_side = Running(url, urls, servers)
                                if number == 0:
                                    warm(url, load, self.warm_share)
                                figures, _ = self._serve(running_side, load)
                            self.ablation.setdefault(side.name, []).append(figures)
            except Exception as error:
                traceback.print_exc()
                for side in group_of:
                    self.failed[side.name] = f"{type(error).__name__}: {error}"

    def _serve(self, server: Running, load: Load) -> tuple[dict[str, Any], Answers]:
        flush(server)
        for member in server.gathers:
            member.batches()
        answers = serve(server.url, load)
        figures = answers.figures(load, 2)
        # By request, they would be most of the record.
        del figures["cached_tokens_by_request"]
        if len(server.members) == 1:
            # One answering server: which of its ranks did what is not told.
            del figures["imbalance"], figures["flops_by_rank"]
        if server.gathers:
            figures["gathers"] = gathers(server.gathers)
        return figures, answers

    def _steps(self, side: Side, server: Running) -> None:
        numbers = random.Random(side.name)
        urls = server.members if not side.spanning else [server.url]
        for tokens in self.steps:
            if tokens <= side.chunk:
                seconds = steady_seconds(urls, tokens, side.lanes, side.in_flight, self.step_count, numbers)
                self.timed.setdefault(side.name, {})[str(tokens)] = seconds

    def _latencies(self, side: Side, server: Running) -> None:
        mix = next((load for load in self.loads if load.name == MIX), None)
        ours = self.raw.get(MIX, {}).get(ASYNCEP.name)
        for share in self.rates if mix and ours else ():
            flush(server)
            rate = share * ours[0]["requests_per_s"]
            self.latencies.setdefault(side.name, {})[f"{rate:.2f}"] = serve_at(
                server.url, mix.bodies[:TIMED_PROMPTS], rate, seed=1
            )


def flush(server: Running) -> None:
    """Empties every cache."""
    for url in {server.url, *server.members}:
        flush_cache(url)


def gathers(servers: Sequence[GroupServer]) -> dict[str, Any]:
    """Both ranks' batches since they were last asked for: how long each layer waited, computed and gathered."""
    batches = [batch for server in servers for batch in server.batches()]
    if not batches:
        return {"batches": 0}
    by_layer = zip(*(batch["exposed_s"] for batch in batches), strict=True)
    windows = [value for batch in batches for value in batch["window_s"] if value is not None]
    taken = [value for batch in batches for value in batch["gather_s"] if value is not None]
    return {
        "batches": len(batches),
        "flops_per_batch": statistics.fmean(batch["flops"] for batch in batches),
        "exposed_share": sum(sum(batch["exposed_s"]) for batch in batches) / sum(batch["step_s"] for batch in batches),
        "exposed_s_by_layer": [statistics.fmean(layer) for layer in by_layer],
        "window_s": statistics.median(windows) if windows else None,
        # Those that nobody waited for are known to have taken at most so long.
        "gather_s": min(taken, default=None),
        "step_s": [batch["step_s"] for batch in batches],
    }
