"""How prefill time grows with work: tokens a batch, tokens a prompt, and experts; fitted by the cost model and plotted.

    make bench-prefill-scaling [QUICK=--quick]

One rank on all cores. Each point is one batch, sent as one request, timed by the client: the best of some repetitions,
so that what it shows is the work and not the machine's other tenants; all repetitions are in the record. The fit is
``seconds = fixed + linear FLOPs / rate + attention FLOPs / rate``, over all points with 32 experts; every point is
shown beside it. Writes `bench/out/prefill_scaling.json` and `.png`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from models import QWEN3_147M, QWEN3_TINY, random_qwen3
from records import OUT, Claim, write

from asyncep.local_server import local_server
from asyncep_router.cost import ModelCost

SEED = 0
EXPERTS = 32
MOST_TOKENS = 16384


@dataclass
class Point:
    """One batch: ``prompts`` of ``tokens`` each, through a model with so many experts."""

    series: str
    experts: int
    prompts: int
    tokens: int
    seconds: list[float]
    linear_flops: float
    attention_flops: float
    fitted: float = 0.0

    @property
    def best(self) -> float:
        return min(self.seconds)


def batches(series: str, quick: bool) -> list[tuple[int, int]]:
    """(prompts, tokens each)."""
    if quick:
        return [(1, 64), (2, 64), (4, 64)]
    if series == "tokens a batch":
        return [(count, 128) for count in (1, 2, 4, 8, 16, 32, 64, 128)]
    if series == "tokens a prompt":
        return [(MOST_TOKENS // length, length) for length in (64, 256, 512, 1024, 4096, 16384)]
    return [(32, 128)]


def measure(url: str, cost: ModelCost, series: str, experts: int, options: argparse.Namespace) -> list[Point]:
    numbers = random.Random(SEED)
    points = []
    with httpx.Client(base_url=url, timeout=1800) as http:
        for prompts, tokens in batches(series, options.quick):
            seconds = []
            for _ in range(options.repeats + 1):
                ids = [[numbers.randrange(3, 500) for _ in range(tokens)] for _ in range(prompts)]
                request = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}
                began = time.perf_counter()
                http.post("/generate", json=request).raise_for_status()
                seconds.append(time.perf_counter() - began)
            attention = prompts * cost.attention_flops(tokens)
            whole = prompts * cost.flops(tokens)
            # The first compiles what this shape needs.
            points.append(Point(series, experts, prompts, tokens, seconds[1:], whole - attention, attention))
    return points


def fit(points: list[Point]) -> dict[str, float]:
    """Least squares of relative errors; writes ``fitted`` into the points.

    Returns:
        ``fixed_s``; ``linear`` and ``attention`` in FLOPs a second; ``r2`` of the logarithms.
    """
    rows = np.array([[1.0, p.linear_flops, p.attention_flops] for p in points])
    seconds = np.array([p.best for p in points])
    scale = rows.max(axis=0)
    found, *_ = np.linalg.lstsq(rows / scale / seconds[:, None], np.ones(len(points)), rcond=None)
    found = np.maximum(found / scale, 1e-18)
    for point, row in zip(points, rows, strict=True):
        point.fitted = float(row @ found)
    logs, fitted = np.log(seconds), np.log([p.fitted for p in points])
    r2 = 1 - float(((logs - fitted) ** 2).sum() / ((logs - logs.mean()) ** 2).sum())
    return {"fixed_s": float(found[0]), "linear": float(1 / found[1]), "attention": float(1 / found[2]), "r2": r2}


def plot(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(point.series for point in points))
    figure, axes = pyplot.subplots(1, len(series), figsize=(5 * len(series), 4), squeeze=False)
    for axis, name in zip(axes[0], series, strict=True):
        chosen = [point for point in points if point.series == name]
        across = {
            "tokens a batch": [p.prompts * p.tokens for p in chosen],
            "tokens a prompt": [p.tokens for p in chosen],
            "experts": [p.experts for p in chosen],
        }[name]
        axis.plot(across, [1e3 * p.best for p in chosen], "o", label="measured")
        axis.plot(across, [1e3 * p.fitted for p in chosen], "-", label="fitted")
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="ms")
        axis.set_xticks(across, [f"{value:,}" for value in across], minor=False)
        axis.set_xticks([], minor=True)
        lowest, highest = (1e3 * end(p.best for p in chosen) for end in (min, max))
        # Five round figures: a logarithmic axis would label all or none.
        round_ones = sorted({float(f"{value:.2g}") for value in np.geomspace(lowest, highest, 5)})
        axis.set_yticks(round_ones, [f"{value:,g}" for value in round_ones])
        axis.set_yticks([], minor=True)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs, not how fast")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    base, name = (QWEN3_TINY, "tiny") if options.quick else (QWEN3_147M, "147m")
    usual = base["num_experts"] if options.quick else EXPERTS
    counts = [usual] if options.quick else [8, 16, EXPERTS, 64, 128]
    if options.quick:
        options.repeats = 1
    flags = ["--dp-size", "1", "--skip-tokenizer-init", "--log-level", "error", "--disable-radix-cache"]
    # A request is to be one batch, however large: no router that cuts it at T, and no memory kept free for a GPU's
    # graphs in proportion to it.
    flags += ["--load-balance-method", "round_robin"]
    flags += ["--mem-fraction-static", "0.8"]
    flags += ["--chunked-prefill-size", str(MOST_TOKENS), "--max-prefill-tokens", str(MOST_TOKENS)]
    points: list[Point] = []
    for experts in counts:
        model = random_qwen3(f"qwen3-{name}-{experts}-experts", {**base, "num_experts": experts})
        cost = ModelCost.from_config(json.loads((model / "config.json").read_text()))
        series = ["experts"] if experts != usual else ["tokens a batch", "tokens a prompt", "experts"]
        with local_server(str(model), flags) as url:
            for each in series:
                points += measure(url, cost, each, experts, options)
    fitted = fit([point for point in points if point.experts == usual])
    coefficients = (fitted["fixed_s"], 1 / fitted["linear"], 1 / fitted["attention"])
    for point in points:
        point.fitted = float(np.dot(coefficients, (1.0, point.linear_flops, point.attention_flops)))
        print(
            f"{point.series:16s} {point.experts:4d} experts {point.prompts:4d} x {point.tokens:5d} tokens "
            f"{1e3 * point.best:9.2f} ms, fitted {1e3 * point.fitted:9.2f}, off by {point.best / point.fitted - 1:+.0%}"
        )
    print(
        f"fixed {1e3 * fitted['fixed_s']:.1f} ms, linear {fitted['linear'] / 1e9:.0f} GFLOP/s, "
        f"attention {fitted['attention'] / 1e9:.0f} GFLOP/s, R2 {fitted['r2']:.4f}"
    )
    OUT.mkdir(parents=True, exist_ok=True)
    suffix = "-quick" if options.quick else ""
    plot(points, OUT / f"prefill_scaling{suffix}.png")
    raw: dict[str, Any] = {"points": [asdict(point) for point in points], "fit": fitted}
    claims = [Claim("R2 of the fit by the cost model", fitted["r2"], 0.98, "of the logarithms")]
    print(write(f"prefill_scaling{suffix}", seed=SEED, raw=raw, claims=claims))


if __name__ == "__main__":
    main()
