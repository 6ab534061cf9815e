"""What ends a server, under load: nobody hangs, nothing is left, the next start works."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import shared_memory
from server import Server

from asyncep_sgl.process.ports import free_port

pytestmark = pytest.mark.server

CLIENTS = 24
PROMPTS = 8


class Load:
    """Clients that each wait for one answer; `results` has a status code or the kind of error for each."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.results: list[int | str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self, client: int) -> None:
        prompts = [[(7 * i + 31 * client + k) % 500 + 3 for i in range(1500)] for k in range(PROMPTS)]
        body = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}}
        try:
            self.results.append(httpx.post(self._server.url + "/generate", json=body, timeout=120).status_code)
        except httpx.HTTPError as error:
            self.results.append(type(error).__name__)

    def wait_until_answering(self) -> None:
        """Returns with some requests answered and others in flight."""
        while not self.results:
            time.sleep(0.01)
        assert len(self.results) < CLIENTS, "the load is too light to be interrupted"

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a client hangs"


def wait_for_the_end(processes: list[psutil.Process], seconds: float = 15) -> None:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], alive


@pytest.mark.parametrize("how", ["kill a rank", "kill the launcher", "SIGINT", "SIGTERM"])
def test_the_end_under_load(how: str, serve: Callable[..., Server], tiny_model: Callable[[str], Path]) -> None:
    in_shm = shared_memory.names()
    # With SGLang's own dispatch nobody restarts a rank: its end has to be the server's, at once.
    server = serve(tiny_model("qwen3_moe"), *(["--load-balance-method", "round_robin"] if "rank" in how else []))
    processes = server.processes()
    ranks = server.status()["ranks"]
    load = Load(server)
    load.wait_until_answering()
    ordered = how.startswith("SIG")
    if how == "kill a rank":
        os.kill(ranks[1]["pid"], signal.SIGKILL)
    elif how == "kill the launcher":
        server.process.kill()
    else:
        server.process.send_signal(getattr(signal, how))
    load.join(30)
    # Popen has to reap the launcher itself: psutil would take its status away.
    status = server.process.wait(15)
    wait_for_the_end(processes)
    assert len(load.results) == CLIENTS
    if ordered:
        # What was in flight when the stop began is answered; what came later is refused.
        assert set(load.results) <= {200, 503, "ConnectError", "RemoteProtocolError", "ReadError"}
        assert status == 0
    elif how == "kill a rank":
        assert status == 1
        assert "asyncep: rank 1 (process" in server.log.read_text()
    assert not shared_memory.new_names(in_shm)


def test_an_ordered_stop_answers_what_is_in_flight(
    serve: Callable[..., Server], tiny_model: Callable[[str], Path]
) -> None:
    server = serve(tiny_model("qwen3_moe"), "--shutdown-grace-period-secs", "60")
    ranks = [rank["pid"] for rank in server.status()["ranks"]]
    # Ranks that stand still: everything is in flight when the stop begins.
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    load = Load(server)
    while httpx.get(server.url + "/router/state", timeout=30).json()["submitted"] < CLIENTS * PROMPTS:
        time.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    refused = None
    while refused is None:
        # Until the front has heard of the stop it takes requests as ever.
        answer = server.post("/tokenize", {"prompt": "x"})
        refused = answer if answer.status_code == 503 else None
    assert "stopping" in refused.text
    for pid in ranks:
        # On a slow machine it has stood still for so long that the router has replaced it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    load.join(60)
    assert load.results.count(200) == CLIENTS, load.results
    assert server.process.wait(15) == 0


def test_starts_that_cannot_succeed_say_why(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("qwen3_moe"))

    def start(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "asyncep", "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        return done.returncode, done.stdout + done.stderr

    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(
        '{"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "quantization_config": {"quant_method": "awq"}}'
    )
    port = free_port()
    with psutil.Popen([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]) as other:
        while not other.net_connections():
            time.sleep(0.05)
        for arguments, words in (
            (["--model-path", str(dense)], "is a dense model"),
            (["--model-path", str(quantised)], "quantised (awq)"),
            (["--model-path", str(tmp_path / "nowhere")], "no config.json there"),
            (["--model-path", model, "--port", str(port)], "choose another --port"),
            (["--model-path", model, "--tp-size", "2"], "--dp-size 2"),
        ):
            status, printed = start(*arguments)
            assert status == 2, printed
            assert words in printed, printed
            assert len(printed.strip().splitlines()) == 1, printed
        other.kill()
    status, printed = start("--model-path", model, "--port", str(free_port()), "--asyncep-store-limit", "10k")
    assert status == 1
    assert "--asyncep-store-limit" in printed.strip().splitlines()[-1]
