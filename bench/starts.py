"""What a start and a rank's restart take, with processes forked ahead and without.

    python bench/starts.py [--quick] [--rounds N]

Both sides serve a tiny model on two ranks, in turn, in another order each round. Timed are a start, from the command
to the first 200 of `/health`, and the return of a rank after `kill -9`: ten times in a row where ranks are forked, two
times where they are spawned. Writes `bench/out/starts.json`.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import time
from pathlib import Path

import httpx
from models import QWEN3_TINY, random_qwen3
from records import Claim, write
from rich.console import Console

from asyncep.local_server import local_server

SIDES = {"forked ahead": (), "spawned": ("--asyncep-without", "fork-ahead")}
RESTARTS = {"forked ahead": 10, "spawned": 2}


def side(model: Path, flags: tuple[str, ...], restarts: int) -> dict[str, float]:
    """Seconds of a start and of each restart."""
    found = {}
    began = time.monotonic()
    with local_server(str(model), ("--dp-size", "2", "--skip-tokenizer-init", *flags)) as url:
        found["start"] = time.monotonic() - began
        for number in range(1, restarts + 1):
            rank = httpx.get(f"{url}/asyncep/status", timeout=30).json()["ranks"][1]
            began = time.monotonic()
            os.kill(rank["pid"], signal.SIGKILL)
            while True:
                state = httpx.get(f"{url}/router/state", timeout=30).json()
                if state["restarts"][1] == number and all(state["alive"]):
                    break
                time.sleep(0.05)
            found[f"restart {number}"] = time.monotonic() - began
    return found


def main() -> int:
    """Runs, prints, writes; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="starts of each side (default 3)")
    args = parser.parse_args()
    model = random_qwen3("qwen3-tiny", QWEN3_TINY)
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    console = Console()
    for number in range(1 if args.quick else args.rounds):
        for name in list(SIDES)[:: -1 if number % 2 else 1]:
            raw[name].append(side(model, SIDES[name], RESTARTS[name]))
            console.print(name, ", ".join(f"{what} {seconds:.1f} s" for what, seconds in raw[name][-1].items()))

    def median(name: str, what: str) -> float:
        return statistics.median(run[what] for run in raw[name])

    claims = [
        Claim(
            "start, forked over spawned",
            median("forked ahead", "start") / median("spawned", "start"),
            0.5,
            "ratio",
            False,
        ),
        Claim(
            "first restart, forked over spawned",
            median("forked ahead", "restart 1") / median("spawned", "restart 1"),
            0.5,
            "ratio",
            False,
        ),
        Claim(
            "tenth restart over first, forked",
            median("forked ahead", "restart 10") / median("forked ahead", "restart 1"),
            1.5,
            "ratio",
            False,
        ),
    ]
    for claim in claims:
        console.print(
            f"{'holds' if claim.holds else 'FALLS SHORT'}: {claim.name}: {claim.value:.2f} (wanted {claim.wanted})"
        )
    console.print(str(write("starts" + ("-quick" if args.quick else ""), seed=0, raw=raw, claims=claims)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
