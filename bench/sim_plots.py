"""Pictures of `bench/sim.py`'s record. Drawn from the record alone, so they can be drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"asyncep": "#0b6e4f", "tp": "#c44536", "pp": "#5f6caf", "ep": "#e09f3e", "dp-ep": "#8d5a97"}
PAPER = {
    "mix": (1.35, 1.37),
    "short": (1.3, 1.3),
    "medium": (1.3, 1.3),
    "long": (1.52, 1.59),
    "ultra-long": (1.49, 1.49),
}


def draw(raw: dict[str, Any], folder: Path) -> list[Path]:
    """Writes `sim-*.png` into `folder` and returns their paths."""
    pictures = (
        ("papers", _papers),
        ("devices", _devices),
        ("links", lambda raw: _sweep(raw["links"], "bandwidth", 1e9, "GB/s of each device's link")),
        ("backlog", lambda raw: _sweep(raw["backlog"], "tokens", 1, "new tokens under way on all eight devices")),
    )
    paths = []
    for name, picture in pictures:
        figure = picture(raw)
        path = folder / f"sim-{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        plt.close(figure)
        paths.append(path)
    return paths


def _papers(raw: dict[str, Any]) -> Any:
    """Throughput over the best baseline for every machine, the paper's range as a band."""
    cases = {name: case for name, case in raw["papers"].items() if name.startswith("qwen3-235b")}
    figure, axes = plt.subplots(1, len(cases), figsize=(4 * len(cases), 3.6), sharey=True, squeeze=False)
    for axis, (name, by_workload) in zip(axes[0], cases.items(), strict=True):
        for place, (workload, case) in enumerate(by_workload.items()):
            ours = case["asyncep"].get("tokens_per_second")
            for offset, other in enumerate(("tp", "ep", "dp-ep", "pp")):
                speed = case[other].get("tokens_per_second")
                if ours and speed:
                    axis.bar(place + 0.2 * offset - 0.3, ours / speed, 0.18, color=COLOURS[other])
            low, high = PAPER[workload]
            axis.fill_between([place - 0.45, place + 0.45], low - 0.01, high + 0.01, color="black", alpha=0.45)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(by_workload)), list(by_workload), rotation=30, fontsize=8)
        axis.set_title(name.removeprefix("qwen3-235b-a22b on "), fontsize=10)
    axes[0][0].set_ylabel("AsyncEP's throughput over")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in ("tp", "ep", "dp-ep", "pp")]
    handles.append(plt.Rectangle((0, 0), 1, 1, color="black", alpha=0.45))
    axes[0][-1].legend(handles, ["TP", "EP", "DP-attention + EP", "PP", "paper, over its best"], fontsize=7)
    return figure


def _devices(raw: dict[str, Any]) -> Any:
    figure, axis = plt.subplots(figsize=(6.5, 4))
    names = list(dict.fromkeys(row["name"] for row in raw["devices"]))
    for name in names:
        rows = [row for row in raw["devices"] if row["name"] == name and row["per_device"]]
        style = "--" if "one group" in name else "-"
        axis.plot(
            [row["devices"] for row in rows],
            [row["per_device"] for row in rows],
            style,
            marker="o",
            markersize=3,
            alpha=0.5 if "16K" in name else 1,
            color=COLOURS[name.split(",")[0]],
            label=name,
        )
    axis.set(xscale="log", xlabel="H200s, nodes of eight", ylabel="tokens/s a device", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=7)
    return figure


def _sweep(by_length: dict[str, list[dict[str, Any]]], key: str, unit: float, label: str) -> Any:
    figure, axes = plt.subplots(1, len(by_length), figsize=(5.2 * len(by_length), 3.8), squeeze=False)
    for axis, (length, rows) in zip(axes[0], by_length.items(), strict=True):
        for name, colour in COLOURS.items():
            points = [(row[key] / unit, row[name]) for row in rows if row.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=name, marker="o", markersize=3)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="tokens/s", title=f"prompts of {length} tokens")
        axis.legend(fontsize=7)
    return figure
