"""What many clients get while processes are killed and stopped, links cut, disks filled, and cores taken away.

    python bench/chaos.py [--quick] [--cases NAME …] [--seed N]

A hundred clients ask questions whose right answers they know. In each case something is broken among them; every
request is to be answered right, or refused with a reason. Where the server ends, it has to say why, at once, and leave
nothing. Cases: server (kill -9, SIGSTOP, SIGTERM, a core taken away), router (two servers behind the HTTP router),
batches (killed in the middle), disk (full; needs root), hosts (two emulated ones; needs root). Writes
`bench/out/chaos.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from emulation.two_hosts import NoNamespacesError
from hostile import chaos_batches, chaos_fleet, chaos_hosts, chaos_server
from hostile.disturb import Load, Result
from hostile.honest import answers, questions
from hostile.model import hostile_model
from hostile.servers import KEY, Place, end_in_order, place
from records import Claim, write

CASES = ("server", "router", "batches", "disk", "hosts")
_QUICK_CASES = ("server", "batches")
_QUICK_ROLES = ("rank 1",)
_CLIENTS = 100
# A server whose process died says so within so many seconds, or serves again within them.
_REPORTED_S = 5.0
_RANK_BACK_S = 5.0


async def load_of(one: chaos_server.OneServer, seed: int, quick: bool) -> Load:
    """The questions and their right answers, from a server that nothing disturbs."""
    asked = questions(40, seed)
    expected = await answers((await asyncio.to_thread(one.up)).url, asked, KEY)
    return Load(asked, expected, _CLIENTS, before=100 if quick else 300, after=100 if quick else 300)


async def results(here: Place, model: Path, args: argparse.Namespace) -> AsyncIterator[Result]:
    """Each case's result as it comes."""
    seconds = 3.0 if args.quick else 10.0
    one = chaos_server.OneServer(here, model)
    try:
        load = await load_of(one, args.seed, args.quick)
        if "server" in args.cases:
            async for result in chaos_server.stops(one, here, load, seconds, args.roles):
                yield result
            async for result in chaos_server.slow_core(one, load, seconds):
                yield result
            async for result in chaos_server.kills(one, here, load, args.roles):
                yield result
            if not args.quick:
                async for result in chaos_server.deaths_in_a_row(one, load, 10):
                    yield result
                async for result in chaos_server.ordered_end(one, here, load):
                    yield result
        if "batches" in args.cases:
            async for result in chaos_batches.restarts(one, here, load, *((1000, 1) if args.quick else (5000, 4))):
                yield result
    finally:
        one.stop()
    if "disk" in args.cases:
        try:
            async for result in chaos_batches.full_disk(here, model, load, 4000):
                yield result
        except PermissionError as error:
            print(f"left out: {error}", file=sys.stderr)
    if "router" in args.cases:
        with chaos_fleet.fleet(here, model) as two:
            async for result in chaos_fleet.cases(two, here, load, seconds):
                yield result
    if "hosts" in args.cases:
        try:
            async for result in chaos_hosts.cases(model, 20, seconds, args.seed):
                yield result
        except NoNamespacesError as error:
            print(f"left out: {error}", file=sys.stderr)


def claims(found: Sequence[Result]) -> list[Claim]:
    """What is wanted of all cases together, and of each kind of process. Pure."""

    def total(name: str) -> int:
        return sum(getattr(result, name) for result in found)

    made = [
        Claim("requests answered right", total("right"), 1000 if len(found) > 6 else 100, "requests"),
        Claim("requests answered wrong", total("wrong"), 0, "requests", False),
        Claim("requests lost", total("lost"), 0, "requests", False),
        Claim("processes left running", sum(len(result.left_running) for result in found), 0, "processes", False),
        Claim("files left", sum(len(result.left_on_disk) for result in found), 0, "files", False),
    ]
    ended = [result for result in found if result.ended_s is not None]
    made.append(
        Claim("ends without a reason", sum(not _explained(result) for result in ended), 0, "ends", False),
    )
    for result in found:
        if result.ended_s is not None and "SIGTERM" not in result.case:
            made.append(Claim(f"{result.case}: its end is reported after", result.ended_s, _REPORTED_S, "s", False))
        elif "rank" in result.case and result.case.startswith("kill"):
            back = result.whole_again_s if result.whole_again_s is not None else 1e9
            made.append(Claim(f"{result.case}: it is back after", back, _RANK_BACK_S, "s", False))
        elif result.ended_s is None and result.serves_again_s is None and "batch" not in result.case:
            made.append(Claim(f"{result.case}: serves again after", 1e9, 60.0, "s", False))
    return made


def _explained(result: Result) -> bool:
    """A killed launcher or router can say nothing; every other end has a line of its own."""
    return bool(result.reason) or any(word in result.case for word in ("launcher", "the router"))


async def run(args: argparse.Namespace) -> list[Result]:
    found = []
    with place() as here:
        began = time.monotonic()
        async for result in results(here, hostile_model(), args):
            found.append(result)
            shown = {name: value for name, value in result.record().items() if value not in (None, [], {}, 0, 0.0, "")}
            print(f"[{time.monotonic() - began:.0f} s] {shown}", flush=True)
    return found


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the cases that matter most, about a minute and a half")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}; default all")
    parser.add_argument(
        "--roles",
        nargs="+",
        choices=chaos_server.ROLES,
        metavar="NAME",
        help=f"of the processes that are killed and stopped: {', '.join(chaos_server.ROLES)}; default all",
    )
    parser.add_argument("--seed", type=int, default=13, metavar="N")
    args = parser.parse_args(arguments)
    args.cases = args.cases or (_QUICK_CASES if args.quick else CASES)
    args.roles = tuple(args.roles or (_QUICK_ROLES if args.quick else chaos_server.ROLES))
    return args


def main() -> int:
    """Runs, prints, writes; returns 1 if a claim does not hold."""
    args = options()
    end_in_order()
    found = asyncio.run(run(args))
    made = claims(found)
    for claim in made:
        state = "holds" if claim.holds else "FALLS SHORT"
        print(f"{state}: {claim.name}: {claim.value:g} {claim.unit} (wanted {claim.wanted:g})")
    raw: dict[str, Any] = {"cases": [result.record() for result in found], "clients": _CLIENTS}
    print(write("chaos" + ("-quick" if args.quick else ""), seed=args.seed, raw=raw, claims=made))
    return 0 if all(claim.holds for claim in made) else 1


if __name__ == "__main__":
    raise SystemExit(main())
