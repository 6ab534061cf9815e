"""Hostile requests on every route of the server and of the router in front of it, beside clients that behave.

    python bench/fuzz.py [--quick] [--requests N] [--seed N] [--peer DIR]

Each field of each of SGLang's request models gets the extremes of its type, alone and with others, in single requests
and in lists; then come bodies that are none, cut connections and odd headers. What it wants: no answer 5xx, no death,
none that is late or cannot be read, and not one request of the others lost or wrong. `--peer DIR` (made by
`scripts/peer_schemathesis.sh DIR`) lets schemathesis try as well. The same seed sends the same requests. Findings are
printed as commands, each shrunk as far as it goes. Writes `bench/out/fuzz.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

from hostile.attack import Attack
from hostile.cases import Case
from hostile.feed import Feed
from hostile.honest import Clients, answers, questions
from hostile.model import hostile_model
from hostile.schema import routes, sglang_document
from hostile.schemathesis_peer import run_schemathesis
from hostile.servers import end_in_order
from hostile.stand import Stand, stand
from hostile.watch import Lateness, Watch
from hostile.wire import send
from records import Claim, write

_MOST_GROWTH = 1 << 30
# Fields of a body, beyond which schemathesis takes minutes over an operation.
_SMALL_BODY = 12


async def attack(both: Stand, args: argparse.Namespace) -> tuple[dict[str, Any], list[Claim]]:
    """The attack on a stand that is ready, and what it came to."""
    asked = questions(20, args.seed)
    expected = await answers(both.server.url, asked, both.key)
    found = routes(await asyncio.to_thread(sglang_document))
    async with (
        Feed(found, args.seed) as feed,
        Watch(both.roles, 2.0) as watch,
        Lateness() as lateness,
        Clients(both.urls[0], asked, expected, both.key, 2) as direct,
        Clients(both.urls[1], asked, expected, both.key, 2) as routed,
    ):
        run = Attack(both, feed, in_flight=args.in_flight, most_ends=3 if args.quick else 20)
        began = time.monotonic()
        await run.run(seconds=args.seconds, requests=args.requests)
        seconds = time.monotonic() - began
        peers = []
        for url in both.urls if args.peer else ():
            # Where the router has no schema of its own, the server's says what it takes.
            described = await send(url, Case("GET", "/openapi.json", None), both.key)
            whose = url if described.status == 200 else both.urls[0]
            if whose != url:
                described = await send(whose, Case("GET", "/openapi.json", None), both.key)
            document = json.loads(described.body)
            apart = sorted({route.path for route in routes(document) if len(route.fields) > _SMALL_BODY})
            examples, each = (5, 20.0) if args.quick else (30, 150.0)
            peers += await run_schemathesis(
                args.peer,
                f"{whose}/openapi.json",
                url,
                both.key,
                apart=apart,
                seed=args.seed,
                examples=examples,
                seconds=each,
            )
    await run.shrink(30 if args.quick else 900)
    score = run.score
    growth, whose = watch.largest_growth()
    honest = {"server": direct.tally.summary(), "router": routed.tally.summary()}
    failed = sum(tally[what] for tally in honest.values() for what in ("wrong", "refused", "lost"))
    slowest = max((tally["max_s"] or 0.0) for tally in honest.values())
    raw = {
        "seconds": seconds,
        "statuses": dict(score.statuses.most_common()),
        "slowest_s": score.slowest,
        "skipped_as_known_deadly": score.skipped,
        "late_because_another_killed": score.beside_deaths,
        "ends_of_the_server": score.ends,
        "findings": [finding.record() for finding in score.findings.values()],
        "schemathesis": peers,
        "honest": honest,
        "clients_loop_late_s": {"longest": lateness.longest, "stops": lateness.stops},
        "largest_growth": {"bytes": growth, "process": whose},
        "memory": watch.raw(),
    }
    sent = score.sent + sum(peer["requests"] for peer in peers)
    claims = [
        Claim("hostile requests sent", sent, args.wanted, "requests"),
        Claim("kinds of wrong answers found", len(score.findings), 0, "findings", False),
        *_claims_of_schemathesis(peers),
        Claim("processes that died", score.deaths, 0, "deaths", False),
        Claim("requests of well-behaved clients", sum(tally["right"] for tally in honest.values()), 20, "requests"),
        Claim("of them refused, wrong or lost", failed, 0, "requests", False),
        Claim("slowest of them", slowest, 10.0, "s", False),
        Claim("largest growth of a process", growth / 2**20, _MOST_GROWTH / 2**20, "MiB", False),
    ]
    return raw, claims


def _claims_of_schemathesis(peers: list[dict[str, Any]]) -> list[Claim]:
    if not peers:
        return []
    failures = sum(peer["failures"] + peer["errors"] for peer in peers)
    return [
        Claim("failures that schemathesis found", failures, 0, "failures", False),
        Claim("operations that each of its runs tried", min(peer["operations"] for peer in peers), 1, "operations"),
    ]


async def run(args: argparse.Namespace) -> tuple[dict[str, Any], list[Claim]]:
    async with stand(hostile_model()) as both:
        return await attack(both, args)


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some 40 s of attack, the same claims but for the number")
    parser.add_argument("--requests", type=int, default=100_000, metavar="N", help="to send (default 100000)")
    parser.add_argument("--seconds", type=float, metavar="S", help="at most (default 3600, quick 40)")
    parser.add_argument("--seed", type=int, default=13, metavar="N")
    parser.add_argument("--in-flight", type=int, default=16, metavar="N", help="hostile requests at once (default 16)")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="environment with schemathesis")
    args = parser.parse_args(arguments)
    args.wanted = 300 if args.quick else args.requests
    args.seconds = args.seconds or (40.0 if args.quick else 3600.0)
    return args


def main() -> int:
    """Runs, prints, writes; returns 1 if a claim does not hold."""
    args = options()
    end_in_order()
    raw, claims = asyncio.run(run(args))
    for finding in raw["findings"]:
        print(f"\n{finding['wrong']} ({finding['count']} times): {finding['answer'][:300]}\n  {finding['command']}")
    for claim in claims:
        state = "holds" if claim.holds else "FALLS SHORT"
        print(f"{state}: {claim.name}: {claim.value:g} {claim.unit} (wanted {claim.wanted:g})")
    print(write("fuzz" + ("-quick" if args.quick else ""), seed=args.seed, raw=raw, claims=claims))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
