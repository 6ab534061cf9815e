"""Requests a second through the router inside the engine, with ranks that compute nothing.

    python bench/router_inside.py [--quick] [--profile FILE]

The router is the real process, started as SGLang's engine starts it; requests are SGLang's own messages with 2,048
token ids, groups of ten sharing half, sent over the tokenizer's socket, `--window` of them out at a time; ranks take
them and report through the ranks' own line. The router has one core to itself, everything else shares the others.
"per core" divides by the processor time that the router used, so that it means the same on a busy machine; "wall" is
what the clients saw. No cache events: a null rank has no cache. Writes `bench/out/router_inside.json`.
"""

from __future__ import annotations

import argparse
import cProfile
import multiprocessing
import os
import pickle
import random
import signal
import statistics
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq
from models import QWEN3_TINY, random_qwen3
from records import Claim, write

from asyncep_sgl.config.run import AsyncEPConfig, RouterConfig
from asyncep_sgl.config.settings import RunSettings
from asyncep_sgl.experts.store.server import StoreServer
from asyncep_sgl.launcher.command_line import parse, sglang_arguments
from asyncep_sgl.router.state import router_state

SEED = 20261123
TOKENS = 2048
GROUP = 10
THRESHOLD_TOKENS = 16_384
RANKS = 2
START_SECONDS = 300


def controller(profile: str | None, *arguments: Any) -> None:
    """The router's process. With a profile, SIGTERM ends it and writes what took its time."""
    from sglang.srt.managers.data_parallel_controller import run_data_parallel_controller_process

    if profile is not None:
        profiler = cProfile.Profile()

        def finish(*_: object) -> None:
            profiler.disable()
            profiler.dump_stats(profile)
            os._exit(0)

        def begin(*_: object) -> None:
            profiler.enable()

        signal.signal(signal.SIGTERM, finish)
        signal.signal(signal.SIGUSR2, begin)
    run_data_parallel_controller_process(*arguments)


@contextmanager
def store(ranks: int) -> Iterator[StoreServer]:
    """The launcher's part that the router talks to."""
    server = StoreServer(ranks)
    ended, end = os.pipe()

    def serve() -> None:
        poller = zmq.Poller()
        poller.register(server.socket, zmq.POLLIN)
        poller.register(ended, zmq.POLLIN)
        while ended not in dict(poller.poll()):
            server.serve_pending()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server
    finally:
        os.write(end, b"x")
        thread.join()
        server.close()
        os.close(ended)
        os.close(end)


def frames(count: int, name: str) -> list[bytes]:
    """Requests as the tokenizer's process sends them."""
    from sglang.srt.managers import io_struct
    from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
    from sglang.srt.sampling.sampling_params import SamplingParams

    rng = random.Random(SEED + count)

    def ids(length: int) -> array[int]:
        return array("q", (rng.randrange(100_000) for _ in range(length)))

    sent = []
    shared: list[array[int]] = []
    # Ten groups are under way at a time, as when a few tasks' questions come in mixed.
    for number in range(count):
        if number % (GROUP * GROUP) == 0:
            shared = [ids(TOKENS // 2) for _ in range(GROUP)]
        request = io_struct.TokenizedGenerateReqInput(
            rid=f"{name}-{number}",
            input_text=None,
            input_ids=shared[number % GROUP] + ids(TOKENS // 2),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=SamplingParams(max_new_tokens=0),
            return_logprob=True,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=[1, 2, 3],
            stream=False,
        )
        request.time_stats = io_struct.wrap_as_pickle(APIServerReqTimeStats())
        pickled = io_struct._USE_PICKLE_IPC
        sent.append(pickle.dumps(request, pickle.HIGHEST_PROTOCOL) if pickled else io_struct.msgpack_encode(request))
    return sent


def load(requests: list[bytes], window: int, to_router: zmq.Socket[bytes], done: zmq.Socket[bytes]) -> float:
    """Send all, `window` out at a time; seconds until the last is done."""
    started = time.perf_counter()
    out = finished = 0
    for frame in requests:
        while out >= window:
            count = int.from_bytes(done.recv(), "little")
            out -= count
            finished += count
        to_router.send(frame, copy=False)
        out += 1
    while finished < len(requests):
        finished += int.from_bytes(done.recv(), "little")
    return time.perf_counter() - started


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def pin(pid: int, cpus: set[int]) -> None:
    """Every thread of a process."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, cpus)


def measure(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    """Start the router and its ranks, load them, stop them."""
    model = random_qwen3("qwen3-tiny", QWEN3_TINY)
    with store(RANKS) as server:
        config = AsyncEPConfig(
            ranks=RANKS,
            store_address=server.address,
            launcher_pid=os.getpid(),
            load_board=str(Path(directory) / "loads"),
            router=RouterConfig(
                report_address=f"{server.address}-reports",
                state_address=f"{server.address}-router",
            ),
            settings=RunSettings(threshold_tokens=THRESHOLD_TOKENS),
        )
        Path(config.load_board).write_bytes(bytes(4096))
        os.environ.update(config.to_environment())
        os.environ.update({"ASYNCEP_PLATFORM": "cpu", "TMPDIR": directory, "OMP_NUM_THREADS": "1"})
        os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(["0"] * RANKS)
        tempfile.tempdir = directory
        from sglang.srt.plugins import load_plugins

        load_plugins()
        import null_rank
        from sglang.srt.runtime_context import publish
        from sglang.srt.server_args import PortArgs, prepare_server_args
        from sglang.srt.utils.network import get_zmq_socket

        served = parse(["--model-path", str(model), "--dp-size", str(RANKS), "--page-size", "16"])
        server_args = prepare_server_args(sglang_arguments(served, cpu=True, max_total_tokens=65_536))
        server_args.resolve_once()
        publish(server_args, role="tokenizer")
        port_args = PortArgs.init_new(server_args)
        context = zmq.Context()
        to_router = get_zmq_socket(context, zmq.PUSH, port_args.scheduler_input_ipc_name, True)
        done = get_zmq_socket(context, zmq.PULL, port_args.tokenizer_ipc_name, True)
        reader, writer = multiprocessing.Pipe(duplex=False)
        router = multiprocessing.Process(
            target=controller, args=(options.profile, server_args, port_args, writer, null_rank.run)
        )
        router.start()
        try:
            if not reader.poll(START_SECONDS):
                raise RuntimeError(f"the router was not ready in {START_SECONDS} s")
            reader.recv()
            assert router.pid is not None
            cores = sorted(os.sched_getaffinity(0))
            if len(cores) > 1:
                pin(router.pid, {cores[0]})
                pin(os.getpid(), set(cores[1:]))
            watched = psutil.Process(router.pid)
            load(frames(500, "warm"), options.window, to_router, done)
            rows = []
            for repeat in range(options.repeats):
                requests = frames(options.requests, f"r{repeat}")
                if options.profile:
                    os.kill(router.pid, signal.SIGUSR2)
                before = cpu_seconds(watched)
                seconds = load(requests, options.window, to_router, done)
                used = cpu_seconds(watched) - before
                rows.append(
                    {
                        "requests": len(requests),
                        "wall_requests_per_s": len(requests) / seconds,
                        "cpu_seconds_per_request": used / len(requests),
                        "requests_per_cpu_second": len(requests) / used,
                        "resident_mb": watched.memory_info().rss / 1e6,
                    }
                )
                print({key: round(value, 6) for key, value in rows[-1].items()}, flush=True)
            return {"rows": rows, "state": router_state(f"{server.address}-router")}
        finally:
            router.terminate()
            router.join()
            context.destroy(linger=0)


def main() -> int:
    """Run, print, write. Returns 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer requests, the same claims")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--window", type=int, default=256, help="requests out at a time")
    parser.add_argument("--profile", help="file for a cProfile of the router (its figures are then not to be used)")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.repeats = 2_000, 3
    multiprocessing.set_start_method("spawn")
    with tempfile.TemporaryDirectory() as directory:
        raw = measure(options, directory)
    rows = raw["rows"]
    claims = [
        Claim(
            "requests/s through face one, by the router's own processor time (median)",
            statistics.median(row["requests_per_cpu_second"] for row in rows),
            2000,
            "1/s",
        ),
        Claim(
            "requests/s through face one, as the clients saw them (best round)",
            max(row["wall_requests_per_s"] for row in rows),
            2000,
            "1/s",
        ),
        Claim(
            "requests finished of those sent",
            raw["state"]["finished"] / raw["state"]["submitted"],
            1.0,
            "",
        ),
    ]
    raw["window"], raw["threshold_tokens"], raw["prompt_tokens"] = options.window, THRESHOLD_TOKENS, TOKENS
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value:.4g} (wanted {claim.wanted:g})")
    print(write("router_inside", seed=SEED, raw=raw, claims=claims))
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    raise SystemExit(main())
