"""One link: exposed wait against a batch's FLOPs, and whether one host's trouble reaches the other."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emulation.group import GroupServer, group, random_prompt
from emulation.two_hosts import two_hosts

from asyncep_router.cost import ModelCost

SEED = 7
MARGIN = 1.2
# Batches are to go past the crossing, so they are cut well above it; what is called T below has the usual margin.
FLAGS = (
    "--chunked-prefill-size", "36864", "--max-prefill-tokens", "36864",
    "--max-total-tokens", "131072", "--disable-radix-cache",
)  # fmt: skip
GATHERING = ("--asyncep-margin", "1.8")
# So many of a batch's last layers show what a layer waits.
STEADY = 2
# Batches of so much of what calibration says just hides a gather.
SHARES = (0.3, 0.45, 0.6, 0.75, 0.9, 1.05, 1.25, 1.5)


def sweep(servers: Sequence[GroupServer], lengths: Sequence[int], rounds: int, vocabulary: int) -> list[dict[str, Any]]:
    """Both hosts compute the same lengths in the same shuffled order; returns their batches."""
    order = list(lengths) * rounds
    random.Random(SEED).shuffle(order)

    def load(numbered: tuple[int, GroupServer]) -> list[dict[str, Any]]:
        number, server = numbered
        numbers = random.Random(SEED + number)
        # Two in flight: the next batch is waiting when one ends, as under load.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda tokens: server.ask(random_prompt(numbers, tokens, vocabulary)), order))
        return server.batches()

    with ThreadPoolExecutor(len(servers)) as pool:
        found = list(pool.map(load, enumerate(servers)))
    return [batch for batches in found for batch in batches]


def points(batches: Sequence[dict[str, Any]], layers: int) -> list[dict[str, float]]:
    """For each batch: FLOPs a layer, a layer's mean exposed wait, its share of the step, its mean window.

    The mean is over the last layers. The first ones live on what was fetched while the batch before ended, and on the
    attention that stands between a layer's release and the wait after the next one: a window that is a little too short
    uses this up, layer by layer, before anything waits. The share is of all.
    """
    found = []
    for batch in batches:
        steady = batch["exposed_s"][-STEADY:]
        windows = [window for window in batch["window_s"] if window is not None]
        found.append(
            {
                "layer_flops": batch["flops"] / layers,
                "exposed_s": statistics.fmean(steady),
                "worst_layer_share": max(batch["exposed_s"]) / batch["step_s"],
                "share": sum(batch["exposed_s"]) / batch["step_s"],
                "step_s": batch["step_s"],
                "window_s": statistics.fmean(windows) if windows else 0.0,
            }
        )
    return found


def crossing(found: Sequence[dict[str, float]], seconds: float) -> float | None:
    """FLOPs a layer where the falling branch of exposed wait, fitted as a line, reaches zero.

    A line through the median of each length: a moment's other load must not turn it.
    """
    by_flops: dict[int, list[float]] = {}
    for point in found:
        by_flops.setdefault(round(point["layer_flops"] / 1e6), []).append(point["exposed_s"])
    medians = [(key * 1e6, statistics.median(waits)) for key, waits in by_flops.items()]
    falling = [(flops, wait) for flops, wait in medians if wait > 0.1 * seconds]
    if len(falling) < 2:
        return None
    slope, intercept = statistics.linear_regression(*zip(*falling, strict=True))
    return -intercept / slope if slope < 0 else None


def neighbours(
    servers: Sequence[GroupServer], tokens: int, repeats: int, vocabulary: int, other_core: int
) -> dict[str, list[float]]:
    """Step seconds of host 0 at T while host 1 is idle, stopped, flooded; in turn, ``repeats`` times.

    Args:
        other_core: host 1's. Its clients run there too: host 0 is not to pay for them.
    """
    one, other = servers
    numbers = random.Random(SEED)
    found: dict[str, list[float]] = {"idle": [], "stopped": [], "flooded": []}
    scheduler = other.scheduler()

    def steps() -> list[float]:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda _: one.ask(random_prompt(numbers, tokens, vocabulary)), range(4)))
        # The first may have met a batch of the state before.
        return [batch["step_s"] for batch in one.batches()][1:]

    steps()
    for _ in range(repeats):
        found["idle"] += steps()
        scheduler.send_signal(signal.SIGSTOP)
        try:
            found["stopped"] += steps()
        finally:
            scheduler.send_signal(signal.SIGCONT)
        with _flooded(other, vocabulary, other_core):
            found["flooded"] += steps()
    return found


def apart(
    servers: Sequence[GroupServer], tokens: int, repeats: int, vocabulary: int, other_core: int
) -> dict[str, list[float]]:
    """Seconds a prompt on host 0 while host 1 is idle and flooded, where the two share no experts.

    Two emulated hosts have one memory and one last-level cache: what is lost here is this machine's, not the gather's.
    """
    one, other = servers
    numbers = random.Random(SEED)
    found: dict[str, list[float]] = {"idle": [], "flooded": []}

    def seconds() -> float:
        began = time.monotonic()
        one.ask(random_prompt(numbers, tokens, vocabulary))
        return time.monotonic() - began

    seconds()
    for _ in range(repeats):
        found["idle"] += [seconds() for _ in range(3)]
        with _flooded(other, vocabulary, other_core):
            found["flooded"] += [seconds() for _ in range(3)]
    return found


@contextmanager
def _flooded(server: GroupServer, vocabulary: int, core: int) -> Iterator[None]:
    """Eight clients that ask ``server`` without a pause, on ``core``."""
    done = threading.Event()

    def flood(number: int) -> None:
        # Of this thread alone.
        os.sched_setaffinity(0, {core})
        mine = random.Random(SEED + number)
        while not done.is_set():
            server.ask(random_prompt(mine, 600, vocabulary))

    with ThreadPoolExecutor(8) as pool:
        floods = [pool.submit(flood, number) for number in range(8)]
        try:
            yield
        finally:
            done.set()
        for one_flood in floods:
            one_flood.result()


def measure(rate: str, model: Path, config: dict[str, Any], quick: bool, expected: list[list[float]]) -> dict[str, Any]:
    """Everything about one link; ``expected`` are one host's answers to the first prompts."""
    layers, vocabulary = config["num_hidden_layers"], config["vocab_size"]
    cost = ModelCost.from_config(json.loads((model / "config.json").read_text()))
    most = config["max_position_embeddings"] - 64
    repeats = 1 if quick else 3
    with two_hosts(rate) as hosts:
        with group(hosts, model, *FLAGS, *GATHERING) as servers:
            numbers = random.Random(SEED)
            prompts = [random_prompt(numbers, 200, vocabulary) for _ in expected]
            answers = [[server.ask(prompt) for prompt in prompts] for server in servers]
            for server in servers:
                server.batches()
            foretold = [server.status()["gathers"][0] for server in servers]
            saturation = statistics.fmean(report["saturation_flops"] for report in foretold)
            lengths = [max(64, min(most, cost.tokens_within(share * saturation * layers))) for share in SHARES]
            batches = sweep(servers, lengths[::3] if quick else lengths, 1 if quick else 4, vocabulary)
            status = [server.status() for server in servers]
            reports = [found["gathers"][0] for found in status]
            seconds = statistics.fmean(report["seconds"] for report in reports)
            saturation = statistics.fmean(report["saturation_flops"] for report in reports)
            at_threshold = max(64, min(most, cost.tokens_within(MARGIN * saturation * layers)))
            near = neighbours(servers, at_threshold, repeats, vocabulary, hosts.core(1))
        with group(hosts, model, *FLAGS, divided=False) as servers:
            without = apart(servers, at_threshold, repeats, vocabulary, hosts.core(1))
    found = points(batches, layers)
    return {
        "rate": rate,
        "answers_agree": all(answer == expected for answer in answers),
        "foretold": foretold,
        "reports": reports,
        "status": status,
        "t_ep_s": seconds,
        "saturation_flops": saturation,
        "crossing_flops": crossing(found, seconds),
        "points": found,
        "batches": batches,
        "neighbours": near,
        "apart": without,
        "tokens_at_threshold": at_threshold,
    }
