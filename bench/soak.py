"""Half an hour of honest and hostile requests together: memory and descriptors of every process.

    python bench/soak.py [--quick] [--seconds N] [--seed N]

What every process needs it has after the first five minutes. From then on its memory is to stay within 5 %, without
pages of files and with each shared page divided by who share it, and its descriptors are to be as many in the end, when
nobody asks, as they were then. The ranks' prefix caches are small, so that they, and what routers remember of them, are
full by then: what grows later is no cache. Clients that behave are to be answered right throughout. Writes
`bench/out/soak.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hostile.attack import Attack
from hostile.feed import Feed
from hostile.honest import Clients, answers, questions
from hostile.model import hostile_model
from hostile.schema import routes, sglang_document
from hostile.servers import end_in_order
from hostile.stand import Stand, stand
from hostile.watch import Watch, growth, held
from records import Claim, write

_SETTLED_SHARE = 1 / 6  # five minutes of thirty
_WITHIN = 0.05
_HONEST = 8
_HOSTILE = 4
# The server and the router close a connection that has been idle for 75 s, the longest of their times; nothing tells
# when they have.
_QUIET_SECONDS = 90.0
# The router checks each server every 60 s and keeps that connection for a while, so that it is there at some moments
# of a minute and not at others. What a process holds is what is there at every moment of more than a minute.
_LOOK_SECONDS = 70.0
# Tokens of a rank's prefix cache: four of the longest prompts.
_CACHE = ("--max-total-tokens", "16384")


async def quiet_descriptors(both: Stand, quiet: float, look: float) -> dict[str, Counter[str]]:
    """Descriptors that each process holds for all of ``look`` seconds, after ``quiet`` seconds without requests."""
    await asyncio.sleep(quiet)
    kept = {name: held(process) for name, process in both.roles().items()}
    for _ in range(round(look)):
        await asyncio.sleep(1.0)
        kept = {name: kept[name] & held(process) for name, process in both.roles().items() if name in kept}
    return kept


async def stretch(both: Stand, attack: Attack, load: Mapping[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Both kinds of clients for so long; what the honest ones got at the server and at the router."""
    async with (
        Clients(both.urls[0], load["asked"], load["expected"], both.key, _HONEST) as direct,
        Clients(both.urls[1], load["asked"], load["expected"], both.key, _HONEST) as routed,
    ):
        await attack.run(seconds=seconds, requests=sys.maxsize)
    return [direct.tally.summary(), routed.tally.summary()]


async def soaked(both: Stand, args: argparse.Namespace) -> tuple[dict[str, Any], list[Claim]]:
    """The load on a stand that is ready, and what it came to."""
    asked = questions(40, args.seed)
    load = {"asked": asked, "expected": await answers(both.server.url, asked, both.key)}
    found = routes(await asyncio.to_thread(sglang_document))
    settled = args.seconds * _SETTLED_SHARE
    quiet, look = min(_QUIET_SECONDS, args.seconds / 5), min(_LOOK_SECONDS, args.seconds / 5)
    async with Feed(found, args.seed) as feed, Watch(both.roles, max(1.0, args.seconds / 360)) as watch:
        # A run that was stopped takes no more cases: each stretch has one of its own, on the same stream of them.
        early = Attack(both, feed, in_flight=_HOSTILE, most_ends=3)
        tallies = await stretch(both, early, load, settled)
        before = await quiet_descriptors(both, quiet, look)
        settled_at = watch.seconds()
        late = Attack(both, feed, in_flight=_HOSTILE, most_ends=3)
        tallies += await stretch(both, late, load, args.seconds - settled)
        loaded_until = watch.seconds()
        after = await quiet_descriptors(both, quiet, look)
    growths = {name: growth(series, settled_at, loaded_until) for name, series in watch.series.items()}
    worst = max((value for value in growths.values() if value is not None), default=0.0)
    failed = sum(tally[what] for tally in tallies for what in ("wrong", "refused", "lost"))
    score = {"sent": early.score.sent + late.score.sent, "deaths": early.score.deaths + late.score.deaths}
    apart = {name: (_number(before.get(name)), _number(after.get(name))) for name in sorted(before | after)}
    unequal = {
        name: {"gone": dict(before[name] - after[name]), "new": dict(after[name] - before[name])}
        for name, pair in apart.items()
        if pair[0] != pair[1] and name in before and name in after
    }
    raw = {
        "seconds": args.seconds,
        "settled_after_s": settled_at,
        "growth": growths,
        "descriptors": apart,
        "unequal": unequal,
        "honest": tallies,
        "hostile": {**score, "findings": [f.record() for a in (early, late) for f in a.score.findings.values()]},
        "memory": watch.raw(),
    }
    return raw, [
        Claim("seconds of load", args.seconds, 60 if args.quick else 1800, "s"),
        Claim("largest growth of a process's memory once settled", worst, _WITHIN, "share", False),
        Claim(
            "processes whose descriptors are not as many",
            sum(one != other for one, other in apart.values()),
            0,
            "processes",
            False,
        ),
        Claim("honest requests answered right", sum(tally["right"] for tally in tallies), 100, "requests"),
        Claim("honest requests refused, wrong or lost", failed, 0, "requests", False),
        Claim("hostile requests beside them", score["sent"], 100, "requests"),
        Claim("processes that died", score["deaths"], 0, "deaths", False),
    ]


def _number(descriptors: Counter[str] | None) -> int | None:
    """Of all descriptors; a connection is there twice, by its state and as a socket."""
    if descriptors is None:
        return None
    return sum(count for what, count in descriptors.items() if not what.startswith("tcp "))


async def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Claim]]:
    async with stand(hostile_model(), *_CACHE) as both:
        return await soaked(both, args)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute: shows that it works")
    parser.add_argument("--seconds", type=float, metavar="N", help="of load (default 1800, quick 60)")
    parser.add_argument("--seed", type=int, default=13, metavar="N")
    args = parser.parse_args(arguments)
    args.seconds = args.seconds or (60.0 if args.quick else 1800.0)
    return args


def main() -> int:
    """Runs, prints, writes; returns 1 if a claim does not hold."""
    args = options()
    end_in_order()
    raw, claims = asyncio.run(run(args))
    for name, value in raw["growth"].items():
        grown = "too few samples" if value is None else f"{value:+.1%}"
        print(f"{name}: {grown}, descriptors {raw['descriptors'].get(name)} {raw['unequal'].get(name, '')}")
    for claim in claims:
        state = "holds" if claim.holds else "FALLS SHORT"
        print(f"{state}: {claim.name}: {claim.value:g} {claim.unit} (wanted {claim.wanted:g})")
    print(write("soak" + ("-quick" if args.quick else ""), seed=args.seed, raw=raw, claims=claims))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
