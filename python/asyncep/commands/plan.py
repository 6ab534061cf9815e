"""``asyncep plan``: how to run a model's prefill on given devices, and what would change the answer."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from asyncep.plan.inputs import WORKLOADS, InputError, read_cluster, read_config, read_model, read_workload
from asyncep.plan.planner import BATCHES, Change, Option, Plan, Planner
from asyncep.plan.serving import MillionRows, Start, million_rows, start_of
from asyncep.sim import hardware
from asyncep.sim.calibration import read_calibration
from asyncep.sim.errors import DataError, DoesNotFit, SimulationError
from asyncep.sim.skew import MEASURED_RATIO, ExpertSkew
from asyncep.sim.steady import Profile
from asyncep.sim.work import ITEMSIZE


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(prog="asyncep plan", description=__doc__)
    flags.add_argument(
        "--model",
        required=True,
        help=f"hub name, config.json, its folder, or one of {', '.join(hardware.models())}",
    )
    flags.add_argument(
        "--gpus",
        required=True,
        help=f"COUNTxNAME, such as 8xh100; NAME of {', '.join(hardware.devices())}; or COUNTxFILE.json with a "
        "device of your own (docs/use/plan.md)",
    )
    flags.add_argument(
        "--link", help="between devices of one host: a bandwidth (360GB/s) or a name (default: the device's)"
    )
    flags.add_argument(
        "--between", help="between hosts, each device's part: a bandwidth or a name (default: the device's)"
    )
    flags.add_argument(
        "--host-link", help="from host memory to a device: a bandwidth or a name (default: the device's)"
    )
    flags.add_argument(
        "--host-memory", type=float, metavar="GB", help="host memory for each device (default: the device's)"
    )
    flags.add_argument("--gpus-per-node", type=int, metavar="N", help="devices of a host (default: 8, cpu-core: 1)")
    flags.add_argument("--dtype", default="bf16", choices=sorted(ITEMSIZE), help="of the weights (default: bf16)")
    flags.add_argument(
        "--workload",
        default="few-shot",
        help=f"{', '.join(WORKLOADS)}; a trace (.jsonl of Mooncake or with tokens, shared, group; .csv of Azure); or "
        "lengths, LENGTHxCOUNT such as 512,4096x3 (default: few-shot)",
    )
    flags.add_argument(
        "--batch-tokens",
        type=int,
        default=BATCHES[-1],
        help=f"new tokens of a rank's batch at most (default: {BATCHES[-1]})",
    )
    flags.add_argument(
        "--skew",
        type=float,
        default=MEASURED_RATIO,
        help="load of the busiest expert over that of the least busy (default: 16)",
    )
    flags.add_argument(
        "--calibration", type=Path, metavar="FILE", help="measured figures, see docs/internals/simulator.md"
    )
    flags.add_argument(
        "--price", type=float, metavar="X", help="of a device an hour, in any currency: prints what a million rows cost"
    )
    flags.add_argument("--json", action="store_true", help="print the plan as JSON")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the plan; 0, 1 if nothing fits, 2 for a wrong flag."""
    given = parser().parse_args(arguments)
    try:
        planner = _planner(given)
    except SimulationError as error:
        print(f"asyncep plan: {error}", file=sys.stderr)
        return 2
    try:
        plan = planner.plan()
    except DoesNotFit as error:
        print(f"asyncep plan: --gpus {given.gpus}: no strategy fits. {error}", file=sys.stderr)
        return 1
    start = start_of(plan.best, planner.cluster, *_named(given.model))
    million = million_rows(plan.best, planner.cluster.devices, given.price)
    if given.json:
        data = {**as_data(planner, plan), "start": asdict(start), "million_rows": asdict(million)}
        print(json.dumps({**data, "calibration": str(given.calibration) if given.calibration else None}, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        show(planner, plan, console)
        show_start(start, million, given.calibration, console)
    return 0


def _named(model: str) -> tuple[str, Mapping[str, Any]]:
    named = read_config(model)
    return named.start_as, named.config


def _planner(given: argparse.Namespace) -> Planner:
    if given.batch_tokens < 1:
        raise InputError(f"--batch-tokens {given.batch_tokens}: must be at least 1")
    if given.price is not None and not given.price >= 0:
        raise InputError(f"--price {given.price}: must be at least 0")
    if given.gpus_per_node is not None and given.gpus_per_node < 1:
        raise InputError(f"--gpus-per-node {given.gpus_per_node}: must be at least 1")
    try:
        skew = ExpertSkew(given.skew)
    except DataError as error:
        raise InputError(f"--skew {given.skew}: {error}") from error
    model = read_model(given.model, given.dtype)
    cluster = read_cluster(
        given.gpus,
        link=given.link,
        between=given.between,
        host=given.host_link,
        per_node=given.gpus_per_node,
        host_gb=given.host_memory,
    )
    if given.calibration is not None:
        try:
            cluster = read_calibration(given.calibration).apply(cluster)
        except DataError as error:
            raise InputError(f"--calibration {error}") from error
    try:
        cluster.device.check_dtype(model.dtype)
    except DataError as error:
        raise InputError(f"--dtype {given.dtype}: {error}") from error
    return Planner(model, cluster, Profile.of(model, read_workload(given.workload)), skew, given.batch_tokens)


def as_data(planner: Planner, plan: Plan) -> dict[str, Any]:
    """The plan as plain data. Bytes, seconds, tokens, FLOPs."""
    return {
        "model": planner.model.name,
        "dtype": planner.model.dtype,
        "gpus": planner.cluster.devices,
        "device": planner.cluster.device.name,
        "workload": {
            "mean_tokens": planner.profile.mean_length,
            "longest": planner.profile.longest,
            "cached_share": planner.profile.cached_share,
        },
        "kv_free": plan.kv_free,
        "choice": _option(plan.best),
        "others": [_option(option) for option in plan.options[1:]],
        "refused": [asdict(refusal) for refusal in plan.refused],
        "changes": [asdict(change) for change in plan.changes],
    }


def _option(option: Option) -> dict[str, Any]:
    deployment, memory = option.deployment, option.deployment.memory
    return {
        "strategy": option.strategy,
        "group": deployment.group,
        "batch_tokens": option.result.lane_tokens,
        "t_ep_seconds": deployment.t_ep,
        "threshold_tokens": deployment.threshold_tokens,
        "threshold_flops_per_layer": deployment.threshold if deployment.t_ep else 0.0,
        "peak_threshold_flops_per_layer": deployment.peak_threshold,
        "mfu": option.result.mfu,
        "tokens_per_second": option.result.tokens_per_second,
        "requests_per_second": option.result.requests_per_second,
        "batch_seconds": option.result.latency,
        "stalled": option.result.stalled,
        "memory": {**asdict(memory), "total": memory.total} if memory else None,
    }


def show(planner: Planner, plan: Plan, console: Console) -> None:
    """Two tables: the strategies, and what would change the choice."""
    best, profile = plan.best, planner.profile
    deployment, memory = best.deployment, best.deployment.memory
    console.print(
        f"[bold]{best.strategy}[/bold], groups of {deployment.group}, batches of {best.result.lane_tokens:,} new "
        f"tokens: {digits(best.result.tokens_per_second)} tokens/s, {digits(best.result.requests_per_second)} "
        "requests/s, "
        f"MFU {best.result.mfu:.1%}"
    )
    console.print(
        f"{planner.model.name} in {planner.model.dtype} on {planner.cluster.devices} x {planner.cluster.device.name}; "
        f"prompts of {digits(profile.mean_length)} tokens on average, {profile.cached_share:.0%} found in caches"
        + ("; no cache kept (KV-free)" if plan.kv_free else "")
    )
    if deployment.t_ep:
        console.print(
            f"T: {digits(deployment.threshold_tokens)} tokens, {deployment.threshold / 1e12:.3g} TFLOP a layer "
            f"(from the peak: {deployment.peak_threshold / 1e12:.3g}); t_EP {deployment.t_ep * 1e3:.3g} ms a layer"
        )
    if memory:
        console.print(
            f"GB of a device ({memory.capacity / 1e9:.1f} usable): dense {memory.dense / 1e9:.1f}, "
            f"experts {memory.experts / 1e9:.1f}, gathered {memory.slots / 1e9:.1f}, "
            f"activations {memory.activations / 1e9:.1f}, KV {memory.kv / 1e9:.1f}"
            + (f"; in host memory {memory.host / 1e9:.1f}" if memory.host else "")
        )
    table = Table(
        "strategy", "group", "batch tokens", "tokens/s", "MFU", "batch s", "stalled", "GB a device", "GB host"
    )
    for option in plan.options:
        used = option.deployment.memory
        table.add_row(
            option.strategy,
            str(option.deployment.group),
            f"{option.result.lane_tokens:,}",
            digits(option.result.tokens_per_second),
            f"{option.result.mfu:.1%}",
            f"{option.result.latency:.3g}",
            f"{option.result.stalled:.1%}",
            f"{used.total / 1e9:.1f}" if used else "",
            f"{used.host / 1e9:.1f}" if used else "",
        )
    console.print(table)
    if plan.changes:
        changes = Table("to win", "what", "today", "needed")
        for change in plan.changes:
            changes.add_row(change.strategy, change.quantity, *_words(change))
        console.print(changes)
    for refusal in plan.refused:
        console.print(f"{refusal.strategy} cannot run: {refusal.reason}", markup=False, highlight=False)


def show_start(start: Start, million: MillionRows, calibration: Path | None, console: Console) -> None:
    """How to start it, what a million rows take, and what the figures rest on."""
    several = f"{start.servers} servers behind a router, each: " if start.servers > 1 else ""
    lines = [f"start: {several}{start.command}", *(f"before that: {need}" for need in start.needs)]
    cost = f", {digits(million.cost)} at the price given" if million.cost is not None else ""
    lines.append(
        f"a million rows: {timedelta(seconds=round(million.seconds))} (h:mm:ss), {digits(million.device_hours)} "
        f"device hours{cost}"
    )
    lines.append(
        f"simulated, calibrated on {calibration}"
        if calibration
        else "simulated, calibrated on nothing: figures of data sheets, and assumed shares of them"
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def digits(value: float) -> str:
    """Three digits, which is more than a simulation knows."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def _words(change: Change) -> tuple[str, str]:
    today = f"{digits(change.now)} {change.unit}"
    if change.at is None:
        return today, f"nowhere from {digits(change.low)} to {digits(change.high)}"
    side = "at most" if change.at < change.now else "at least"
    return today, f"{side} {digits(change.at)} {change.unit}"
