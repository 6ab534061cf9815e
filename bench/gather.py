"""The gather over a real, limited link between two emulated hosts: is it hidden, from which FLOPs on, and does one
host's trouble reach the other? And the same from a disk, in too little memory.

    python bench/gather.py                          # bench/out/gather.json and gather.png
    python bench/gather.py --rates 760mbit 1600mbit # links by hand
    python bench/gather.py --plot FILE              # draws a record again

Two links: those that give a core of this machine the FLOPs a byte of an H100 and of an A100 on NVLink. For each, both
hosts compute prompts of growing length, one prompt a batch, at the same time. Each rank logs what every layer of every
batch waited. The exposed wait falls with a batch's FLOPs and reaches zero somewhere; that crossing is compared with
what calibration foretold (``saturation_flops``). Then batches at T with the other host idle, with its rank stopped
(SIGSTOP), and flooded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import models
from emulation import hybrid
from emulation.gather_claims import disk_claims, link_claims, plot
from emulation.group import GroupServer, random_prompt
from emulation.link_rates import Link, by_ratio, core_peak
from emulation.links import SEED, measure
from emulation.memory_limit import NoControlGroupsError
from emulation.two_hosts import NoNamespacesError, two_hosts
from records import Claim, write
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from asyncep.local_server import local_server

# A window lies between two layers that gather, so there have to be some beside the resident first.
TINY: dict[str, Any] = {**models.QWEN3_TINY, "num_hidden_layers": 5}


def table_of(raw: dict[str, Any]) -> Table:
    table = Table("link", "t_EP ms", "hides at GFLOPs/layer", "crossing", "T tokens", "exposed share by FLOPs")
    for rate, found in raw.items():
        by_flops: dict[float, list[float]] = {}
        for point in found["points"]:
            by_flops.setdefault(round(point["layer_flops"] / max(found["saturation_flops"], 1.0), 1), []).append(
                point["share"]
            )
        curve = " ".join(f"{x:.1f}:{statistics.median(shares):.1%}" for x, shares in sorted(by_flops.items()))
        cross = "-" if found["crossing_flops"] is None else f"{found['crossing_flops'] / 1e9:.1f}"
        table.add_row(
            rate, f"{found['t_ep_s'] * 1e3:.1f}", f"{found['saturation_flops'] / 1e9:.1f}", cross,
            str(found["tokens_at_threshold"]), curve,
        )  # fmt: skip
    return table


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and one link: shows that it works")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only draw this record again")
    parser.add_argument("--rates", nargs="+", metavar="RATE", help="links as tc writes them (default: by the ratios)")
    parser.add_argument(
        "--isa",
        choices=("amx", "avx512_bf16"),
        help="the core's instructions: amx, or avx512_bf16 for a slower core without tiles (default: the best)",
    )
    parser.add_argument("--no-disk", action="store_true", help="leave out the checkpoint on disk (8 GB)")
    parser.add_argument("--no-links", action="store_true", help="only the checkpoint on disk")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    if chosen.plot:
        plot(json.loads(chosen.plot.read_text())["raw"]["links"], chosen.plot.with_suffix(".png"))
        return 0
    if chosen.isa:
        os.environ["ASYNCEP_CPU_ISA"] = chosen.isa
        os.environ["ONEDNN_MAX_CPU_ISA"] = {"amx": "AVX512_CORE_AMX", "avx512_bf16": "AVX512_CORE_BF16"}[chosen.isa]
    console = Console()
    name = "gather-quick" if chosen.quick else "gather"
    config = TINY if chosen.quick else models.QWEN3_147M
    model = models.random_qwen3("qwen3-tiny-5" if chosen.quick else "qwen3-147m", config)
    peak = core_peak()
    links = [Link(rate, "given") for rate in chosen.rates or ()] or by_ratio(peak)
    if chosen.quick and not chosen.rates:
        links = [Link("100mbit", "quick")]
    for link in links:
        console.print(f"link {link.rate} ({link.stands_for}); a core computes {peak / 1e9:.0f} GFLOP/s in bf16")
    raw: dict[str, Any] = {"peak_flops_per_second": peak, "isa": chosen.isa, "links": {}, "on_disk": None}
    claims: list[Claim] = []
    if not chosen.no_links:
        try:
            with two_hosts(links[0].rate):
                pass
        except NoNamespacesError as error:
            console.print(f"bench-gather needs emulated hosts: {error}")
            return 3
        with Progress(console=console) as progress:
            task = progress.add_task("one host, for comparison", total=len(links) + 1)
            numbers = random.Random(SEED)
            prompts = [random_prompt(numbers, 200, config["vocab_size"]) for _ in range(4)]
            with local_server(str(model), ["--dp-size", "1", "--skip-tokenizer-init"]) as url:
                expected = [GroupServer(url, None, Path()).ask(prompt) for prompt in prompts]  # type: ignore[arg-type]
            progress.advance(task)
            for link in links:
                progress.update(task, description=f"two hosts, {link.rate}")
                found = measure(link.rate, model, config, chosen.quick, expected)
                raw["links"][link.rate] = {**found, "stands_for": link.stands_for}
                claims += link_claims(link.rate, found)
                # Written as it grows: what a later part meets does not lose an earlier one.
                write(name, seed=SEED, raw=raw, claims=claims)
                progress.advance(task)
    try:
        if not chosen.no_disk:
            console.print("a checkpoint on disk, in limited memory (the first time it is written: 8 GB)")
            raw["on_disk"] = hybrid.measure(chosen.quick)
            claims += disk_claims(raw["on_disk"])
    except NoControlGroupsError as error:
        console.print(f"experts on disk are left out: {error}")
    if raw["links"]:
        console.print(table_of(raw["links"]))
    for claim in claims:
        console.print(
            f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value:.4g} {claim.unit} ({claim.wanted})"
        )
    path = write(name, seed=SEED, raw=raw, claims=claims)
    if raw["links"]:
        plot(raw["links"], path.with_suffix(".png"))
    console.print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
