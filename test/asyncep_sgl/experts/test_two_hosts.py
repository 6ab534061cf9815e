"""Two hosts that keep half of the experts each, joined by a slow link, two ranks on each. The tests stand in order."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import server as servers
from host_pair import LABELS, PORT, one_by_one, prompts, start_on
from server import Server
from two_hosts import Hosts, NoNamespacesError, two_hosts

pytestmark = pytest.mark.server

PATIENCE = 6


class Pair(NamedTuple):
    hosts: Hosts
    one: Server
    other: Server
    start: Callable[..., Server]
    alone: Server


@pytest.fixture(scope="module")
def pair(
    tiny_model: Callable[[str], Path], serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    started: list[Server] = []
    with _hosts() as hosts:

        def start(host: int, model: Path | None = None, port: int = PORT) -> Server:
            log = tmp_path_factory.mktemp("host") / "log.txt"
            path = model or tiny_model("qwen3_moe")
            flags = ("--asyncep-strategy", "asyncep", "--asyncep-log-gathers")
            started.append(start_on(hosts, host, path, log, *flags, port=port, patience=PATIENCE))
            return started[-1]

        try:
            # Node 1 first: the one that is waited for may be any.
            other, one = start(1), start(0)
            alone = serve(tiny_model("qwen3_moe"), "--device", "cpu", ranks=1)
            for server in (one, other):
                servers.wait_measured(server)
            yield Pair(hosts, one, other, start, alone)
        finally:
            for server in started:
                server.stop(signal.SIGKILL)


def _hosts() -> Any:
    try:
        # Entering is what fails where namespaces are forbidden.
        with two_hosts("100mbit"):
            pass
    except NoNamespacesError as error:
        pytest.skip(str(error))
    return two_hosts("100mbit")


def gathers(server: Server) -> int:
    return server.log.read_text().count('"event": "gather"')


def test_each_host_takes_packets_in_on_its_own_core(pair: Pair) -> None:
    for host in (0, 1):
        steering = f"/sys/class/net/{pair.hosts.interface(host)}/queues/rx-0/rps_cpus"
        look = f"cat {steering}; taskset -p $$"
        done = subprocess.run(pair.hosts.command(host, ["sh", "-c", look]), capture_output=True, text=True, check=True)
        receiving, computing = done.stdout.splitlines()
        assert int(receiving.replace(",", ""), 16) == int(computing.rpartition(" ")[2], 16) != 0


def test_logits_are_bit_for_bit_those_of_one_host(pair: Pair) -> None:
    wanted = prompts(12, seed=1)
    expected = one_by_one(pair.alone, wanted)
    assert one_by_one(pair.one, wanted) == expected
    assert one_by_one(pair.other, wanted) == expected
    assert gathers(pair.one) >= len(wanted)


def test_each_host_reads_and_keeps_its_own_experts_only(pair: Pair) -> None:
    whole = pair.alone.status()["expert_bytes"]
    first_layer = whole // 3  # kept by both: --asyncep-resident-layers 1
    for server in (pair.one, pair.other):
        status = server.status()
        assert status["expert_bytes"] == first_layer + (whole - first_layer) // 2
        assert status["resident_bytes"] == status["expert_bytes"]
        assert sum(rank["bytes_read"] for rank in status["ranks"]) == status["expert_bytes"]
        for report in status["gathers"]:
            assert report["layers"] == 2
            assert report["bytes_per_layer"] == whole // 3 // 2
            assert report["seconds"] > 0
            assert report["threshold_flops"] >= 0  # on a model this small anything may hide a gather


def test_another_model_is_refused_and_told_why(pair: Pair, tiny_model: Callable[[str], Path]) -> None:
    stranger = pair.start(1, tiny_model("mixtral"), PORT + 1)
    assert stranger.process.wait(servers.START_SECONDS) == 1
    assert "give every host the same checkpoint (--model-path" in stranger.log.read_text()
    twin = pair.start(1, port=PORT + 1)
    assert twin.process.wait(servers.START_SECONDS) == 1
    assert "--node-rank 1 is taken by" in twin.log.read_text()
    wanted = prompts(2, seed=2)
    assert one_by_one(pair.one, wanted) == one_by_one(pair.alone, wanted)


def test_a_gather_that_came_wrong_is_seen_and_repeated(pair: Pair) -> None:
    """The owner's memory is changed under it: what a torn, stale or misplaced read looks like to the reader."""
    wanted = prompts(4, seed=3)
    expected = one_by_one(pair.alone, wanted)
    memory = _expert_memory(pair.other, "L2.w13_weight")
    with memory.open("r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        held = size // 2  # node 1 keeps the second half
        file.seek(held)
        before = file.read(64)
        file.seek(held)
        file.write(bytes(byte ^ 0xFF for byte in before))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(one_by_one, pair.one, wanted)
            deadline = time.monotonic() + 60
            while "came wrong" not in pair.one.log.read_text() and time.monotonic() < deadline and not answer.done():
                time.sleep(0.05)
            file.seek(held)
            file.write(before)
            assert answer.result(120) == expected
    assert "layer 2 came wrong" in pair.one.log.read_text()
    assert any(report["digest_failures"] for report in pair.one.status()["gathers"])


def _expert_memory(server: Server, name: str) -> Path:
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            if f"asyncep-{name}" in os.readlink(descriptor):
                return descriptor
        except FileNotFoundError:
            continue
    raise AssertionError(f"no memory named {name}")


class Load:
    """Requests one after the other from a few threads until it is stopped; every answer is kept."""

    def __init__(self, server: Server, wanted: list[list[int]], threads: int = 4) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.refused: list[str] = []
        self._stop = threading.Event()
        # Daemons: a test that fails leaves them running, and pytest has to end all the same.
        self._threads = [
            threading.Thread(target=self._run, args=(server, wanted, i), daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, server: Server, wanted: list[list[int]], start: int) -> None:
        position = start
        while not self._stop.is_set():
            index = position % len(wanted)
            position += 1
            body = {
                "input_ids": wanted[index],
                "sampling_params": {"max_new_tokens": 0},
                "return_logprob": True,
                "token_ids_logprob": LABELS,
            }
            response = server.post("/generate", body, timeout=300)
            if response.status_code == 200:
                values = response.json()["meta_info"]["output_token_ids_logprobs"][0]
                self.answers.append((index, [value[0] for value in values]))
            else:
                self.refused.append(f"{response.status_code} {response.text}")
                self._stop.wait(0.5)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int) -> None:
        aim = len(self.answers) + more
        deadline = time.monotonic() + 240
        while len(self.answers) < aim:
            assert time.monotonic() < deadline, f"{len(self.answers)} of {aim} answers"
            time.sleep(0.02)

    def check(self, expected: list[list[float]]) -> None:
        # Batches form as they may under load: bf16 sums differ by their order, a wrong expert by far more.
        for index, values in self.answers:
            assert values == pytest.approx(expected[index], abs=0.35), index


def test_a_link_that_is_out_for_a_while_loses_no_request(pair: Pair) -> None:
    wanted = prompts(8, seed=4)
    expected = one_by_one(pair.alone, wanted)
    load = Load(pair.one, wanted)
    load.wait_for(8)
    pair.hosts.link(up=False)
    time.sleep(PATIENCE / 2)
    pair.hosts.link(up=True)
    load.wait_for(16)
    load.stop()
    load.check(expected)
    assert not load.refused


def test_a_rank_that_is_killed_takes_no_experts_with_it(pair: Pair) -> None:
    wanted = prompts(8, seed=5)
    expected = one_by_one(pair.alone, wanted)
    before = {rank["rank"]: rank for rank in pair.other.status()["ranks"]}
    load = Load(pair.one, wanted)
    here = Load(pair.other, wanted, threads=2)
    load.wait_for(4)
    os.kill(before[0]["pid"], signal.SIGKILL)
    load.wait_for(16)
    deadline = time.monotonic() + 240
    while pair.other.status()["ranks"][0]["restarts"] == 0:
        assert time.monotonic() < deadline, "the rank did not come back"
        time.sleep(0.5)
    here.wait_for(4)
    for each in (load, here):
        each.stop()
        each.check(expected)
        assert not each.refused
    assert pair.other.status()["ranks"][0]["bytes_reread"] == 0


def test_the_exporter_may_die_too(pair: Pair) -> None:
    wanted = prompts(8, seed=6)
    expected = one_by_one(pair.alone, wanted)
    load = Load(pair.one, wanted)
    load.wait_for(4)
    exporter = next(p for p in pair.other.processes() if "asyncep_sgl.experts.group.exporter" in p.cmdline())
    exporter.kill()
    load.wait_for(16)
    load.stop()
    load.check(expected)
    assert not load.refused
    assert "the exporter was killed by SIGKILL; it is started again" in pair.other.log.read_text()


def test_a_host_that_dies_and_comes_back(pair: Pair) -> None:
    wanted, fresh = prompts(8, seed=7), prompts(8, seed=8)
    expected, alone = one_by_one(pair.alone, wanted), one_by_one(pair.alone, fresh)
    load = Load(pair.one, wanted)
    load.wait_for(4)
    children = pair.other.processes()
    pair.other.process.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, alive
    # Nobody else has its experts: after the patience clients are told so, those that waited and new ones.
    deadline = time.monotonic() + 60
    while not load.refused:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert load.refused[0].startswith("503"), load.refused[0]
    assert "the experts of node 1 (tcp://" in load.refused[0]
    assert httpx.get(pair.one.url + "/asyncep/status", timeout=30).status_code == 200
    # It cannot compute, and says so to whoever balances load.
    assert httpx.get(pair.one.url + "/health", timeout=30).status_code == 503
    load.stop()
    load.check(expected)
    back = pair.start(1)
    servers.wait_measured(back)
    deadline = time.monotonic() + 60
    while (
        pair.one.post("/generate", {"input_ids": wanted[0], "sampling_params": {"max_new_tokens": 0}}).status_code
        != 200
    ):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # Prompts that nobody has sent: what the load left in the cache was computed in batches, whose sums may differ.
    assert one_by_one(pair.one, fresh) == alone
    assert one_by_one(back, fresh) == alone


def test_ctrl_c_leaves_nothing(pair: Pair) -> None:
    processes = pair.one.processes()
    assert pair.one.stop(signal.SIGINT) == 0
    assert not [process for process in processes[1:] if process.is_running()]
    assert subprocess.run(["ip", "netns", "pids", pair.hosts._name(0)], capture_output=True, text=True).stdout == ""
