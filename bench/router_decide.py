"""What a routing decision costs: time, memory, and how both grow.

    python bench/router_decide.py [--quick]

One decision is `submit` + `poll` of the frontend on the shared radix tree: block hashes, match, placement,
charge, insert. Reports that free the ranks again are timed apart. Writes `bench/out/router_decide.json`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import resource
import time
from array import array
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from records import Claim, write

from asyncep.sim.workloads import random_tokens
from asyncep_router.config import Limits
from asyncep_router.cost import ModelCost
from asyncep_router.messages import BatchReport, Request
from asyncep_router.routing_policy import RoutingPolicy

IMPORT_STARTED = time.perf_counter()
from asyncep_router.radix import SharedRadixTree  # noqa: E402  its import is one of the things timed

IMPORT_SECONDS = time.perf_counter() - IMPORT_STARTED

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 20260501
QWEN3_235B = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
}
COST = ModelCost.from_config(QWEN3_235B)
PAGE = 16


def resident_mb() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


class Prompts:
    """Prompts of `tokens` tokens, half of them one of 200 shared openings, half their own."""

    def __init__(self, tokens: int) -> None:
        self.rng = random.Random(SEED)
        self.half = tokens // 2
        self.heads = [random_tokens(self.rng, tokens - self.half) for _ in range(200)]

    def __call__(self) -> array[int]:
        return self.rng.choice(self.heads) + random_tokens(self.rng, self.half)


def filled(budget: int, ranks: int, prompts: Prompts) -> tuple[SharedRadixTree, float]:
    """A tree filled to its budget, and its memory in MB."""
    gc.collect()
    before = resident_mb()
    tree = SharedRadixTree(budget, PAGE)
    rng = random.Random(SEED)
    while tree.total_tokens < budget - 4 * prompts.half:
        tree.insert(rng.randrange(ranks), prompts())
    return tree, resident_mb() - before


def frontend(tree: SharedRadixTree, ranks: int, tokens: int) -> RoutingPolicy:
    """T is a few prompts, so that every rule of the policy comes up."""
    front = RoutingPolicy(COST, tree, Limits(default_threshold=4 * COST.flops(tokens)))
    for rank in range(ranks):
        front.rank_joined(rank)
    return front


def decide(front: RoutingPolicy, prompts: Prompts, count: int, in_flight: int) -> dict[str, float]:
    """Microseconds a decision and a report take, with `in_flight` requests out at a time.

    Wall clock, as promised to users; beside it `cpu_*`, the thread's own time, and how often another process
    took the core away: on a shared machine the slowest percent by the wall is the neighbours'.
    """
    decisions, reports, own = [], [], []
    preempted = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    out: deque[tuple[int, str]] = deque()
    now = 0.0
    clock = time.perf_counter
    for number in range(count):
        now += 1e-3
        request = Request(f"d{number}", prompts(), now)
        start, began = clock(), time.thread_time()
        front.submit(request, now)
        sent = front.poll(now)
        own.append(time.thread_time() - began)
        decisions.append(clock() - start)
        out.extend((each.rank, each.rid) for each in sent)
        while len(out) > in_flight or front.pending > in_flight:
            rank, rid = out.popleft()
            start = clock()
            front.report(BatchReport(rank, (rid,), 1e12, 0.1), now)
            sent = front.poll(now)
            reports.append(clock() - start)
            out.extend((each.rank, each.rid) for each in sent)
    while out:
        rank, rid = out.popleft()
        front.report(BatchReport(rank, (rid,), 1e12, 0.1), now)
        out.extend((each.rank, each.rid) for each in front.poll(now))
    return {
        "p50_us": quantile(decisions, 0.5),
        "p99_us": quantile(decisions, 0.99),
        "max_us": max(decisions) * 1e6,
        "cpu_p50_us": quantile(own, 0.5),
        "cpu_p99_us": quantile(own, 0.99),
        "cpu_mean_us": sum(own) / count * 1e6,
        "preempted": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - preempted,
        "report_p50_us": quantile(reports, 0.5),
        "report_p99_us": quantile(reports, 0.99),
    }


def quantile(seconds: list[float], q: float) -> float:
    """In microseconds."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] * 1e6 if ordered else 0.0


def alone(part: Callable[..., Any], *arguments: Any) -> Any:
    """Run a part in a process of its own, so that its memory is its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(part, arguments)


def settle() -> None:
    """As the router process does after start-up: what lives long is not scanned again and again."""
    gc.collect()
    gc.freeze()


def tree_per_rank(ranks: int, total: int, prompts: Prompts, count: int) -> dict[str, float]:
    """The alternative: a stock `RadixCache` for every rank, all of them asked at every decision."""
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

    gc.collect()
    before = resident_mb()
    trees = [RadixCache.create_simulated(page_size=PAGE) for _ in range(ranks)]
    rng = random.Random(SEED)
    stored = 0
    while stored < total:
        tokens = prompts()
        stored += len(tokens)
        rng.choice(trees).insert(InsertParams(key=RadixKey(tokens)))
    memory = resident_mb() - before
    settle()
    times = []
    for _ in range(count):
        tokens = prompts()
        start = time.perf_counter()
        for tree in trees:
            tree.match_prefix(MatchPrefixParams(key=RadixKey(tokens)))
        times.append(time.perf_counter() - start)
    gc.unfreeze()
    stored = sum(tree.total_size() for tree in trees)
    return {
        "p50_us": quantile(times, 0.5),
        "p99_us": quantile(times, 0.99),
        "stored_tokens": stored,
        "memory_mb": memory,
        "bytes_per_token": memory * 1e6 / stored,
    }


def match_alone(tree: SharedRadixTree, prompts: Prompts, count: int) -> dict[str, float]:
    """The same question to the shared tree."""
    times = []
    for _ in range(count):
        tokens = prompts()
        start = time.perf_counter()
        tree.match(tokens)
        times.append(time.perf_counter() - start)
    return {"p50_us": quantile(times, 0.5), "p99_us": quantile(times, 0.99)}


def backlog(requests: int, ranks: int, tokens: int) -> dict[str, float]:
    """A batch job: everything is submitted at once, then dispatched as the ranks report."""
    prompts = Prompts(tokens)
    front = frontend(SharedRadixTree(10_000_000, PAGE), ranks, tokens)
    waiting = [Request(f"b{number}", prompts(), 0.0) for number in range(requests)]
    settle()
    start = time.perf_counter()
    for request in waiting:
        front.submit(request, 0.0)
    submitted = time.perf_counter() - start
    polls = []
    sent = front.poll(0.0)
    out = deque((each.rank, each.rid) for each in sent)
    while out:
        rank, rid = out.popleft()
        start = time.perf_counter()
        front.report(BatchReport(rank, (rid,), 1e12, 0.1), 0.0)
        sent = front.poll(0.0)
        polls.append(time.perf_counter() - start)
        out.extend((each.rank, each.rid) for each in sent)
    return {
        "requests": requests,
        "submit_mean_us": submitted / requests * 1e6,
        "report_and_poll_p50_us": quantile(polls, 0.5),
        "report_and_poll_p99_us": quantile(polls, 0.99),
        "report_and_poll_mean_us": sum(polls) / len(polls) * 1e6,
    }


def long_run(requests: int, budget: int, ranks: int, tokens: int) -> list[dict[str, float]]:
    """Memory, above what the process had before, after every tenth of a long run on a full tree."""
    gc.collect()
    before = resident_mb()
    prompts = Prompts(tokens)
    tree, _ = filled(budget, ranks, prompts)
    front = frontend(tree, ranks, tokens)
    rows = []
    for tenth in range(10):
        start = time.perf_counter()
        decide(front, prompts, requests // 10, 4 * ranks)
        rows.append(
            {
                "requests": (tenth + 1) * (requests // 10),
                "memory_mb": resident_mb() - before,
                "tree_tokens": tree.total_tokens,
                "requests_per_s": requests // 10 / (time.perf_counter() - start),
            }
        )
    front.check_integrity()
    return rows


def main() -> int:
    """Run, print, write. Returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer decisions, the same claims")
    parser.add_argument("--out", type=Path, help="file to write instead")
    args = parser.parse_args()
    count = 2_000 if args.quick else 10_000

    # First those that measure memory: a forked process is as large as the one it comes from.
    apart = alone(tree_per_rank, 64, 10_000_000, Prompts(2048), max(50, count // 20))
    job = alone(backlog, 10_000, 64, 2048)
    length = (50_000, 1_000_000) if args.quick else (1_000_000, 10_000_000)
    run = alone(long_run, *length, 64, 2048)

    prompts = Prompts(2048)
    tree, memory = filled(10_000_000, 64, prompts)
    front = frontend(tree, 64, 2048)
    settle()
    main_row = decide(front, prompts, count, 256)
    main_row["memory_mb"] = memory
    main_row["bytes_per_token"] = memory * 1e6 / tree.total_tokens
    shared = match_alone(tree, prompts, count)
    front.check_integrity()
    del front, tree

    growth = []
    for tokens, ranks, size in (
        (512, 64, 10_000_000),
        (8192, 64, 10_000_000),
        (32768, 64, 10_000_000),
        (2048, 1, 10_000_000),
        (2048, 8, 10_000_000),
        (2048, 256, 10_000_000),
        (2048, 64, 1_000_000),
        (2048, 64, 30_000_000),
    ):
        gc.unfreeze()
        shape = Prompts(tokens)
        tree, _ = filled(size, ranks, shape)
        front = frontend(tree, ranks, tokens)
        settle()
        few = max(800, count // (5 * max(1, tokens // 2048)))
        growth.append({"tokens": tokens, "ranks": ranks, "tree": size} | decide(front, shape, few, 256))
        del front, tree
    gc.unfreeze()
    grown = run[-1]["memory_mb"] / run[1]["memory_mb"] - 1

    claims = [
        Claim("decision p50, 64 ranks, 10M-token tree, 2K prompts", main_row["p50_us"], 300, "us", at_least=False),
        Claim("decision p99, 64 ranks, 10M-token tree, 2K prompts", main_row["p99_us"], 1500, "us", at_least=False),
        Claim("the same by the thread's own time, p99", main_row["cpu_p99_us"], 1500, "us", at_least=False),
        Claim(f"memory growth from 20% to 100% of {run[-1]['requests']} requests", grown * 100, 5, "%", at_least=False),
        Claim(
            "shared tree's match over 64 trees' matches, p50",
            shared["p50_us"] / apart["p50_us"],
            0.25,
            "ratio",
            at_least=False,
        ),
    ]
    result: dict[str, Any] = {
        "decision": main_row,
        "growth": growth,
        "shared_tree_match": shared,
        "tree_per_rank_match": apart,
        "backlog": job,
        "long_run": run,
        "import_seconds": IMPORT_SECONDS,
        "quick": args.quick,
        "page_size": PAGE,
    }
    write("router_decide", seed=SEED, raw=result, claims=claims, path=args.out)
    show(result, claims)
    return 0 if all(claim.holds for claim in claims) else 1


def show(result: dict[str, Any], claims: list[Claim]) -> None:
    """The figures as text."""
    for claim in claims:
        mark = "holds" if claim.holds else "FAILS"
        print(f"{mark}  {claim.name}: {claim.value:.3g} {claim.unit} (wanted at most {claim.wanted:g})")
    for name in ("decision", "shared_tree_match", "tree_per_rank_match", "backlog"):
        print(name, {key: round(value, 1) for key, value in result[name].items()})
    for row in result["growth"]:
        print("growth", {key: round(value, 1) for key, value in row.items()})
    for row in result["long_run"][::3]:
        print("long run", {key: round(value, 1) for key, value in row.items()})


if __name__ == "__main__":
    raise SystemExit(main())
