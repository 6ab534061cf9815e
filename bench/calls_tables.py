"""What bench/calls.py concludes from its record: claims, tables, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calls_one_host import HELP, REST, STOCK
from paper_loads import MIX
from records import Claim
from rich.console import Console
from rich.table import Table

AUTO, CALLS, WEIGHTS = "auto", "ep", "AsyncEP, one-sided"
TP, PP, EP, DP_EP = "TP-2", "PP-2", "EP-2", "DP-attention + EP-2"
ARRIVALS = (0.25, 0.5, 0.8)
# Tokens of the prompts that claims about prompts alone are of.
CLAIMED = ("256", "512", "1024")


def milliseconds(by_side: Mapping[str, Mapping[str, Sequence[float]]], side: str, tokens: str) -> float | None:
    """The median of a side's prompts of one length; None where there are none."""
    seconds = by_side.get(side, {}).get(tokens)
    return statistics.median(seconds) * 1e3 if seconds else None


def speed(raw: Mapping[str, Any], load: str, side: str) -> float | None:
    """Tokens a second of a side on a load, its rounds' median."""
    rounds = raw["loads"].get(load, {}).get(side)
    return statistics.median(one["tokens_per_s"] for one in rounds) if rounds else None


def keeps_up(raw: Mapping[str, Any], side: str, rate: float) -> bool:
    """Whether a side serves as many requests of the mix a second as arrive."""
    rounds = raw["loads"].get(MIX, {}).get(side)
    return bool(rounds) and statistics.median(one["requests_per_s"] for one in rounds) > rate


def percentile(seconds: Sequence[float], share: float) -> float:
    """Of latencies: the value that a share of them does not exceed."""
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def _lone_claims(raw: Mapping[str, Any], part: str, times_faster: float, over_tp_pp: float) -> list[Claim]:
    claims = []
    for factor, by_side in raw[part].items():
        faster, slower = [], []
        compared: set[str] = set()
        for tokens in CLAIMED:
            mine = milliseconds(by_side, AUTO, tokens)
            weights = milliseconds(by_side, WEIGHTS, tokens)
            others = [milliseconds(by_side, name, tokens) for name in (TP, PP)]
            if mine and weights:
                faster.append(weights / mine)
            if mine and (known := [value for value in others if value is not None]):
                compared |= {name for name, value in zip((TP, PP), others, strict=True) if value is not None}
                slower.append(mine / min(known))
        where = f"{part}, link x{factor}, 256 to 1,024 tokens"
        if faster:
            claims.append(Claim(f"{where}: AsyncEP's time over auto's, least", min(faster), times_faster, "x"))
        if slower:
            name = f"{where}: auto's time over the better of {', '.join(sorted(compared))}, most"
            claims.append(Claim(name, max(slower), over_tp_pp, "x", False))
        for other in (EP, DP_EP) if part == "lone" else ():
            pairs = [
                (mine, theirs)
                for tokens in by_side.get(AUTO, {})
                if (mine := milliseconds(by_side, AUTO, tokens)) and (theirs := milliseconds(by_side, other, tokens))
            ]
            if pairs:
                worst = max(mine / theirs for mine, theirs in pairs)
                name = f"lone, link x{factor}: auto's time over {other}'s, any length, most"
                claims.append(Claim(name, worst, 1.0, "x", False))
    return claims


def _one_host_claims(found: Mapping[str, Any]) -> list[Claim]:
    claims = []
    by_side = found.get("seconds", {})
    helped = milliseconds(by_side, HELP, "512")
    for other, most in ((REST, 0.75), (STOCK, 1.0)):
        if helped and (theirs := milliseconds(by_side, other, "512")):
            claims.append(
                Claim(f"one host, a prompt of 512 tokens: {HELP}, over {other}", helped / theirs, most, "x", False)
            )
    if found:
        name = f"one host, answers with and without help that differ in a bit, of {found['answers']}"
        claims.append(Claim(name, found["different"], 0, "answers", False))
    return claims


def claims_of(raw: Mapping[str, Any]) -> list[Claim]:
    """What the project wants shown, of the sides and parts that were run."""
    claims = _lone_claims(raw, "lone", 3.0, 1.4) + _lone_claims(raw, "wide", 7.0, 1.1)
    for load in raw["loads"]:
        mine = speed(raw, load, AUTO)
        if mine is None:
            continue
        if load == MIX:
            if weights := speed(raw, load, WEIGHTS):
                claims.append(Claim("tokens/s of auto over AsyncEP's, mix", mine / weights, 0.99, "x"))
            continue
        others = {name: value for name in (TP, EP, DP_EP) if (value := speed(raw, load, name)) is not None}
        if others:
            name = f"tokens/s of auto over the best of {', '.join(others)}, {load}"
            claims.append(Claim(name, mine / max(others.values()), 1.0, "x"))
        if pipeline := speed(raw, load, PP):
            claims.append(Claim(f"tokens/s of auto over PP's, {load}", mine / pipeline, 0.9, "x"))
    for share in ARRIVALS:
        ours = raw["arrivals"].get(AUTO, {}).get(f"{share:g}")
        for other, most in ((EP, 1.0), (TP, 1.0), (PP, 2.0)):
            theirs = raw["arrivals"].get(other, {}).get(f"{share:g}")
            if theirs and not keeps_up(raw, other, theirs["rate"]):
                continue  # its latency is as long as the arrivals last
            for name, part in (("p50", 0.5), ("p99", 0.99)) if ours and theirs else ():
                value = percentile(ours["seconds"], part) / percentile(theirs["seconds"], part)
                claims.append(Claim(f"{name} of auto over {other}'s at {share:.0%}", value, most, "x", False))
    claims += _one_host_claims(raw.get("one host", {}))
    if raw.get("bits", {}).get("answers"):
        name = f"answers that differ in a bit, of {raw['bits']['answers']}"
        claims.append(Claim(name, raw["bits"]["different"], 0, "answers", False))
    return claims


def show(console: Console, raw: Mapping[str, Any], claims: Sequence[Claim]) -> None:
    """Everything as tables."""
    console.print(f"core {raw['core_peak_flops'] / 1e9:.0f} GFLOP/s in bf16 ({raw['isa']}), links {raw['links']}")
    alone = {f"{part}, link x{factor}": each for part in ("lone", "wide") for factor, each in raw[part].items()}
    if raw.get("one host"):
        alone["one host"] = raw["one host"]["seconds"]
    for where, by_side in alone.items():
        lengths = list(dict.fromkeys(tokens for each in by_side.values() for tokens in each))
        table = Table("ms", *lengths, title=f"Prompts alone, {where}")
        for name, each in by_side.items():
            table.add_row(name, *(f"{statistics.median(each[tokens]) * 1e3:.0f}" for tokens in lengths))
        console.print(table)
    if raw["loads"]:
        names = list(dict.fromkeys(name for by_side in raw["loads"].values() for name in by_side))
        table = Table("tokens/s", *raw["loads"], title="All at once")
        for name in names:
            found = [speed(raw, load, name) for load in raw["loads"]]
            table.add_row(name, *("-" if value is None else f"{value:,.0f}" for value in found))
        console.print(table)
    if raw["arrivals"]:
        columns = [f"{name} at {share:.0%}" for share in ARRIVALS for name in ("p50", "p99")]
        table = Table(
            "s",
            *columns,
            title="Poisson arrivals of the mix, shares of AsyncEP's throughput (* more arrive than the side serves)",
        )
        for name, by_share in raw["arrivals"].items():
            cells = []
            for share in ARRIVALS:
                seconds = by_share.get(f"{share:g}", {}).get("seconds")
                mark = "" if not seconds or keeps_up(raw, name, by_share[f"{share:g}"]["rate"]) else " *"
                cells += [f"{percentile(seconds, part):.2f}{mark}" if seconds else "-" for part in (0.5, 0.99)]
            table.add_row(name, *cells)
        console.print(table)
    for name, reason in raw["failed"].items():
        console.print(f"[bold]{name} failed[/bold]: {reason}")
    table = Table("claim", "value", "wanted", "holds", title="Claims")
    for claim in claims:
        sign = "≥" if claim.at_least else "≤"
        table.add_row(claim.name, f"{claim.value:.3g} {claim.unit}", f"{sign} {claim.wanted:g}", str(claim.holds))
    console.print(table)


def plot(raw: Mapping[str, Any], path: Path) -> None:
    """Prompts alone by length, and latency by load, into ``path``; nothing where there is neither."""
    panels = [(part, factor) for part in ("lone", "wide") for factor in raw[part]]
    panels += [("arrivals", share) for share in (0.5, 0.99) if raw["arrivals"]]
    if not panels:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [name for part in ("lone", "wide") for by_side in raw[part].values() for name in by_side]
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys([*names, *raw["arrivals"]]))}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), squeeze=False)
    for axis, (kind, which) in zip(axes[0], panels, strict=True):
        if kind != "arrivals":
            for name, each in raw[kind][which].items():
                lengths = sorted(map(int, each))
                values = [statistics.median(each[str(tokens)]) * 1e3 for tokens in lengths]
                axis.plot(lengths, values, marker="o", label=name, color=colours[name])
            wide = ", wide experts" if kind == "wide" else ""
            axis.set(xscale="log", xlabel="tokens of a prompt alone", ylabel="ms", title=f"link x{which}{wide}")
        else:
            for name, by_share in raw["arrivals"].items():
                shares = sorted(by_share, key=float)
                values = [percentile(by_share[share]["seconds"], which) for share in shares]
                axis.plot([float(share) for share in shares], values, marker="o", label=name, color=colours[name])
            axis.set(xlabel="load, share of AsyncEP's throughput", ylabel="s", title=f"p{which * 100:g} of the mix")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="lower center", ncol=min(8, len(lines)), fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
