"""Requests a second through the HTTP router, in front of workers without a model.

    python bench/router_http.py                                       # ours, every policy of interest
    python bench/router_http.py --peer VENV/bin/python                # beside sglang_router from PyPI
    python bench/router_http.py --clients 10000 --requests 10000 --max-concurrent 2000 --queue 4000

The router has one core to itself where the machine has two (`--core`); workers and clients share the rest.
"per core" divides by the processor time that the router's process really used, so that it means the same on
a busy machine; "wall" is what the clients saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from records import Claim, write

NULL_WORKER = Path(__file__).parents[1] / "test" / "asyncep_router" / "router_http" / "null_worker.py"
START_SECONDS = 60
SEED = 0
OURS = "asyncep_router asyncep"


@dataclass
class Outcome:
    """What the clients saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Client(asyncio.Protocol):
    """One connection that sends a request as soon as the last one is answered."""

    def __init__(self, bodies: list[bytes], left: list[int], outcome: Outcome) -> None:
        self.bodies, self.left, self.outcome = bodies, left, outcome
        self.done = asyncio.get_running_loop().create_future()
        self.buffer = bytearray()
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.next()

    def next(self) -> None:
        self.busy = self.left[0] > 0
        if not self.busy:
            self.transport.close()
            return
        self.left[0] -= 1
        self.started = time.perf_counter()
        self.transport.write(self.bodies[self.left[0] % len(self.bodies)])

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.buffer[:end]).lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        self.outcome.statuses[head[9:12].decode()] += 1
        self.outcome.latencies.append(time.perf_counter() - self.started)
        self.buffer.clear()
        self.busy = False
        self.next()

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self.outcome.statuses["connection lost"] += 1
        if not self.done.done():
            self.done.set_result(None)


async def load(port: int, bodies: list[bytes], clients: int, requests: int) -> Outcome:
    """Send so many requests from so many clients at once."""
    outcome = Outcome()
    left = [requests]
    loop = asyncio.get_running_loop()

    async def one() -> None:
        try:
            _, protocol = await loop.create_connection(lambda: Client(bodies, left, outcome), "127.0.0.1", port)
        except OSError as error:
            outcome.statuses[type(error).__name__] += 1
            return
        await protocol.done

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - started
    return outcome


def make_bodies(tokens: int, shared: int, count: int) -> list[bytes]:
    """Requests whose prompts of `tokens` tokens begin, in groups of ten, with the same `shared` ones."""
    rng = random.Random(SEED)
    bodies = []
    for index in range(count):
        if index % 10 == 0:
            prefix = [rng.randrange(100_000) for _ in range(shared)]
        ids = prefix + [rng.randrange(100_000) for _ in range(tokens - shared)]
        body = json.dumps({"input_ids": ids, "sampling_params": {"max_new_tokens": 0}}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        bodies.append(head.encode() + b"\r\n\r\n" + body)
    return bodies


def start_worker(ranks: int) -> tuple[subprocess.Popen[bytes], str]:
    command = [sys.executable, str(NULL_WORKER), "--blind", "--dp-size", str(ranks)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def wait_ready(port: int, router: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and router.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the router on {port} did not become ready (status {router.poll()})")


def measure(name: str, command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One router, started, warmed, loaded, stopped."""
    workers = [start_worker(options.ranks) for _ in range(options.workers)]
    port = 20000 + os.getpid() % 10000
    full = [*command, "--worker-urls", *(url for _, url in workers), "--host", "127.0.0.1", "--port", str(port)]
    full += ["--prometheus-port", str(port + 1)]
    if options.max_concurrent > 0:
        full += ["--max-concurrent-requests", str(options.max_concurrent), "--queue-size", str(options.queue)]
    log = Path(options.log).open("ab")  # noqa: SIM115  # closed below, with the processes that write it
    router = subprocess.Popen(full, stdout=log, stderr=log)
    try:
        wait_ready(port, router)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(router.pid, {cores[0]})
            for thread in psutil.Process(router.pid).threads():
                os.sched_setaffinity(thread.id, {cores[0]})
            for pid in (os.getpid(), *(worker.pid for worker, _ in workers)):
                os.sched_setaffinity(pid, set(cores[1:]))
        bodies = make_bodies(options.tokens, options.tokens // 2, 500)
        watched = psutil.Process(router.pid)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(load(port, bodies, 16, 300))
            before = watched.cpu_times()
            outcome = runner.run(load(port, bodies, options.clients, options.requests))
            after = watched.cpu_times()
        os.sched_setaffinity(0, set(cores))
        used = after.user + after.system - before.user - before.system
        answered = sum(outcome.statuses.values())
        latencies = sorted(outcome.latencies)
        return {
            "router": name,
            "statuses": dict(outcome.statuses),
            "per_core": round(answered / used) if used else None,
            "wall": round(answered / outcome.seconds),
            "p50_ms": round(1e3 * latencies[len(latencies) // 2], 2),
            "p99_ms": round(1e3 * latencies[int(len(latencies) * 0.99)], 2),
            "resident_mb": round(watched.memory_info().rss / 1e6),
        }
    finally:
        router.terminate()
        try:
            router.wait(20)
        except subprocess.TimeoutExpired:
            router.kill()
            router.wait()
        for worker, _ in workers:
            worker.kill()
            worker.wait()
        log.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment that has sglang_router")
    parser.add_argument("--policies", nargs="*", default=["asyncep", "round_robin"], help="of ours")
    parser.add_argument("--clients", type=int, default=64, help="connections at once")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=2048, help="of every prompt; half are shared by ten prompts")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=1, help="behind every worker")
    parser.add_argument("--max-concurrent", type=int, default=-1)
    parser.add_argument("--queue", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--log", default=os.devnull, help="file for the routers' output")
    parser.add_argument("--out", type=Path, help="file to write instead of bench/out/router_http.json")
    parser.add_argument("--quick", action="store_true", help="few requests, the same claims")
    options = parser.parse_args()
    if options.quick:
        options.requests = 300
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    runs = []
    for policy in options.policies:
        runs.append((f"asyncep_router {policy}", [sys.executable, "-m", "asyncep_router.launch_router"], policy))
    if options.peer:
        for policy in ("cache_aware", "round_robin"):
            runs.append((f"sglang_router {policy}", [options.peer, "-m", "sglang_router.launch_router"], policy))
    results = []
    for _ in range(options.repeats):
        for name, command, policy in runs:
            result = measure(name, [*command, "--policy", policy], options)
            results.append(result)
            print(json.dumps(result), flush=True)
    told = {key: value for key, value in vars(options).items() if key not in ("peer", "log", "out")}
    claims = claims_of(results)
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value:.4g} (wanted {claim.wanted:g})")
    write("router_http", seed=SEED, raw={"options": told, "results": results}, claims=claims, path=options.out)
    return 0 if all(claim.holds for claim in claims) else 1


def claims_of(results: list[dict[str, Any]]) -> list[Claim]:
    """What our policy is to show, over all rounds of this run."""
    ours = [result for result in results if result["router"] == OURS]
    claims = []
    if ours:
        cores = [result["per_core"] for result in ours if result["per_core"]]
        claims.append(
            Claim("requests/s by the router's own processor time (median)", statistics.median(cores), 800, "1/s")
        )
        wall = max(result["wall"] for result in ours)
        claims.append(Claim("requests/s as the clients saw them (best round)", wall, 800, "1/s"))
    statuses = sum((Counter(result["statuses"]) for result in results), Counter[str]())
    served = sum(count for status, count in statuses.items() if status in ("200", "429"))
    claims.append(Claim("answers that were 200 or 429, of all", served / statuses.total(), 1.0, "share"))
    return claims


if __name__ == "__main__":
    raise SystemExit(main())
