"""What bench/paper.py concludes from its record: claims, tables, a picture."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_loads import LONG, MIX
from records import Claim
from rich.console import Console
from rich.table import Table

OURS, DP, PP = "AsyncEP, one-sided", "DP-2, experts twice", "PP-2"
WITHOUT_PP = ("TP-2", "EP-2", "DP-attention + EP-2")
STOCK = ("TP-2, stock kernels", "PP-2, stock kernels")
# Same strategy, same model, another order of roundings: nats.
SAME = 0.05


def ratio(raw: Mapping[str, Any], load: str, others: Sequence[str]) -> tuple[str, float] | None:
    """(the fastest of `others` on the load, AsyncEP's tokens/s over its), medians over rounds of ratios of one round.

    None where AsyncEP or all of the others have no figures.
    """
    runs = raw["runs"].get(load, {})
    ours = [run["tokens_per_s"] for run in runs.get(OURS, ())]
    found = {}
    for name in others:
        pairs = zip(ours, (run["tokens_per_s"] for run in runs.get(name, ())), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs]
        if ratios:
            found[name] = statistics.median(ratios)
    if not found:
        return None
    fastest = min(found, key=found.__getitem__)
    return fastest, found[fastest]


def goodput(raw: Mapping[str, Any], side: str) -> float:
    """Requests a second answered within the objective, at the best of the rates that were tried."""
    best = 0.0
    for rate, latencies in raw["latencies"].get(side, {}).items():
        good = sum(seconds <= raw["objective_s"] for seconds in latencies) / len(latencies)
        best = max(best, good * float(rate))
    return best


def claims_of(raw: Mapping[str, Any]) -> list[Claim]:
    """What the project wants shown, of the sides that were run."""
    claims = []
    for load, others, wanted, what in (
        (MIX, WITHOUT_PP, 1.35, "the best of TP, EP and DP-attention + EP"),
        (MIX, (PP,), 1.1, "PP"),
        (LONG, WITHOUT_PP, 1.59, "the best of TP, EP and DP-attention + EP"),
        (LONG, (PP,), 1.1, "PP"),
        (MIX, STOCK, 1.8, "the best stock SGLang layout"),
        (MIX, (DP,), 0.95, "replicated DP"),
    ):
        found = ratio(raw, load, others)
        if found is not None:
            claims.append(Claim(f"tokens/s of AsyncEP over {what}, {load} ({found[0]})", found[1], wanted, "x"))
    kept = raw["expert_bytes"]
    if OURS in kept and DP in kept:
        share = max(kept[OURS]) / max(kept[DP])
        claims.append(Claim("expert bytes a host keeps over replicated DP's", share, 0.5, "x", at_least=False))
    others = [goodput(raw, side) for side in raw["latencies"] if side not in (OURS, DP)]
    if OURS in raw["latencies"] and any(others):
        better = goodput(raw, OURS) / max(others)
        claims.append(Claim("goodput of AsyncEP over the best of TP, PP, EP, DP-attention + EP", better, 1.0, "x"))
    for load, by_side in raw["differences"].items():
        worst = max(found["mean"] for found in by_side.values())
        claims.append(Claim(f"log-probabilities apart, mean of the worst side, {load}", worst, SAME, "nats", False))
        mixed = max(found["mean"] / found["between_prompts"] for found in by_side.values())
        claims.append(Claim(f"the same over two prompts' answers apart, {load}", mixed, 0.1, "x", False))
    for row in raw.get("calibration") or ():
        if row["strategy"] != "replicated":
            name = f"simulated against measured step, {row['strategy']}, {row['tokens']} tokens"
            claims.append(Claim(name, abs(row["error"]), 0.1, "relative", False))
    return claims


def show(console: Console, raw: Mapping[str, Any], claims: Sequence[Claim]) -> None:
    """Everything as tables."""
    console.print(
        f"core {raw['core_peak_flops'] / 1e9:.0f} GFLOP/s in bf16 ({raw['isa']}), link {raw['link']} a direction"
    )
    names = list(dict.fromkeys(name for by_side in raw["runs"].values() for name in by_side))
    table = Table("tokens/s, median (least, most)", *raw["runs"], title="Offline throughput")
    for name in names:
        cells = []
        for by_side in raw["runs"].values():
            speeds = [run["tokens_per_s"] for run in by_side.get(name, ())]
            cells.append(_spread(speeds) if speeds else "-")
        table.add_row(name, *cells)
    console.print(table)
    table = Table("load", "batches", "GFLOPs a batch", "exposed", "window ms", "least gather ms", "exposed ms by layer")
    for load, by_side in raw["runs"].items():
        found = [run["gathers"] for run in by_side.get(OURS, ()) if run.get("gathers", {}).get("batches")]
        for one in found[:1]:
            table.add_row(
                load, str(one["batches"]), f"{one['flops_per_batch'] / 1e9:.0f}", f"{one['exposed_share']:.1%}",
                _ms(one["window_s"]), _ms(one["gather_s"]), " ".join(_ms(each) for each in one["exposed_s_by_layer"]),
            )  # fmt: skip
    console.print("AsyncEP's layers: where it falls short, the wait for weights is in which of them")
    console.print(table)
    if raw["latencies"]:
        table = Table("side", "requests/s: p50 s, p99 s", f"requests/s within {raw['objective_s']:g} s")
        for name, by_rate in raw["latencies"].items():
            cells = []
            for rate, latencies in by_rate.items():
                ordered = sorted(latencies)
                p99 = ordered[int(0.99 * (len(ordered) - 1))]
                cells.append(f"{float(rate):.1f}: {statistics.median(ordered):.2f}, {p99:.2f}")
            table.add_row(name, "; ".join(cells), f"{goodput(raw, name):.1f}")
        console.print(table)
    if raw["ablation"]:
        base = statistics.median(run["tokens_per_s"] for run in next(iter(raw["ablation"].values())))
        table = Table("AsyncEP on the mix", "tokens/s", "of unchanged", "exposed", "cached", "FLOPs", "imbalance")
        for name, runs in raw["ablation"].items():
            speeds = [run["tokens_per_s"] for run in runs]
            exposed = [run["gathers"].get("exposed_share", 0.0) for run in runs]
            row = [statistics.median(run[key] for run in runs) for key in ("cached_share", "flops_ratio", "imbalance")]
            table.add_row(
                name, _spread(speeds), f"{statistics.median(speeds) / base:.2f}", f"{statistics.median(exposed):.1%}",
                f"{row[0]:.1%}", f"{row[1]:.3f}", f"{row[2]:.3f}",
            )  # fmt: skip
        console.print(table)
    if raw.get("calibration"):
        table = Table("strategy", "tokens", "measured s", "simulated s", "error", title="Fitted to DP's steps alone")
        for one in raw["calibration"]:
            table.add_row(
                one["strategy"], str(one["tokens"]), f"{one['measured']:.4f}", f"{one['simulated']:.4f}",
                f"{one['error']:+.1%}",
            )  # fmt: skip
        console.print(table)
    for name, reason in raw["failed"].items():
        console.print(f"failed: {name}: {reason}")
    for claim in claims:
        verdict = "holds" if claim.holds else "FAILS"
        console.print(f"{verdict}  {claim.name}: {claim.value:.3g} {claim.unit} ({claim.wanted:g})")


def _spread(values: Sequence[float]) -> str:
    middle = f"{statistics.median(values):,.0f}"
    return f"{middle} ({min(values):,.0f}, {max(values):,.0f})" if len(values) > 1 else middle


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"


def plot(raw: Mapping[str, Any], path: Path) -> Path:
    """Throughput by load and side, the ablation, and simulated against measured steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(22, 7), width_ratios=(1.6, 1, 1), layout="constrained")
    names = list(dict.fromkeys(name for by_side in raw["runs"].values() for name in by_side))
    loads = list(raw["runs"])
    for at, name in enumerate(names):
        heights, spans = [], []
        for load in loads:
            speeds = [run["tokens_per_s"] for run in raw["runs"][load].get(name, ())] or [0.0]
            heights.append(statistics.median(speeds))
            spans.append((heights[-1] - min(speeds), max(speeds) - heights[-1]))
        places = [load + at / (len(names) + 1) for load in range(len(loads))]
        panels[0].bar(places, heights, 1 / (len(names) + 1), yerr=list(zip(*spans, strict=True)), label=name)
    panels[0].set_xticks([at + 0.4 for at in range(len(loads))], [textwrap.fill(load, 13) for load in loads])
    panels[0].set(title=f"two hosts, link {raw['link']}", ylabel="tokens/s")
    # Below the panel: the highest bars reach its top.
    panels[0].legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)
    variants = {name: statistics.median(run["tokens_per_s"] for run in runs) for name, runs in raw["ablation"].items()}
    panels[1].barh(list(variants), list(variants.values()))
    panels[1].invert_yaxis()
    panels[1].set(title="AsyncEP on the mix, one thing changed", xlabel="tokens/s")
    for strategy in dict.fromkeys(row["strategy"] for row in raw.get("calibration") or ()):
        rows = [row for row in raw["calibration"] if row["strategy"] == strategy]
        label = f"{strategy} (fitted)" if strategy == "replicated" else strategy
        panels[2].scatter([row["measured"] for row in rows], [row["simulated"] for row in rows], s=16, label=label)
    if raw.get("calibration"):
        ends = [min(row["measured"] for row in raw["calibration"]), max(row["measured"] for row in raw["calibration"])]
        panels[2].plot(ends, ends, color="grey", linewidth=0.5)
        panels[2].set(xscale="log", yscale="log", xlabel="measured step, s", ylabel="simulated step, s")
        panels[2].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
