"""Routers and null workers as processes, ended whatever happens. Nothing here sleeps for a fixed time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from asyncep_sgl.process.ports import free_port

HERE = Path(__file__).parent
WAIT_SECONDS = 60.0


def wait_for(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Poll another process, which offers nothing to wait on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


class NullWorker:
    """A null worker's process."""

    def __init__(self, ranks: int = 1, port: int = 0, chunk: int = 8192, flags: str = "") -> None:
        command = [sys.executable, str(HERE / "null_worker.py"), "--dp-size", str(ranks)]
        command += ["--port", str(port or free_port()), "--chunk", str(chunk), *flags.split()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def tell(self, order: str, body: str = "") -> dict[str, Any]:
        counts: dict[str, Any] = httpx.post(f"{self.url}/null/{order}", content=body, timeout=30).json()
        return counts

    @property
    def counts(self) -> dict[str, Any]:
        return self.tell("")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class RouterProcess:
    """`launch_router` as users start it."""

    def __init__(self, *workers: str, flags: str = "", log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.key: str | None = None
        """What the harness itself shows to the router."""
        self.port, self.metrics_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "asyncep_router.launch_router", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--prometheus-port", str(self.metrics_port)]
        command += ["--worker-urls", *workers, *flags.split()]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}
            )

    def listening(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return httpx.get(self.url + "/liveness", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def ready(self, workers: int) -> RouterProcess:
        """Return once so many workers take requests."""
        wait_for(self.listening, "router listening")
        wait_for(lambda: self.state()["ready"] and self.healthy() == workers, f"{workers} workers ready")
        return self

    def healthy(self) -> int:
        return sum(worker["is_healthy"] for worker in self.state()["workers"])

    def worker(self, url: str) -> dict[str, Any]:
        return next(worker for worker in self.state()["workers"] if worker["url"] == url)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/router/state").json()
        return found

    def get(self, path: str, key: str | None = None) -> httpx.Response:
        key = key or self.key
        return httpx.get(self.url + path, timeout=30, headers={"Authorization": f"Bearer {key}"} if key else {})

    def metrics(self) -> dict[str, float]:
        text = httpx.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, **options)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class Load:
    """Many requests at once, each prompt's sum known; runs in this process's own event loop."""

    def __init__(self, port: int, prompts: list[list[int]], clients: int | None = None) -> None:
        self.port = port
        self.prompts = prompts
        self.clients = clients or len(prompts)
        self.statuses: list[int | str] = ["unanswered"] * len(prompts)
        self.bodies: list[Any] = [None] * len(prompts)

    async def run(self) -> Load:
        numbers = iter(range(len(self.prompts)))
        await asyncio.gather(*(self._client(numbers) for _ in range(self.clients)))
        return self

    async def _client(self, numbers: Any) -> None:
        for number in numbers:
            try:
                status, body = await self._one(self.prompts[number])
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.statuses[number] = repr(error)
            else:
                self.statuses[number], self.bodies[number] = status, body

    async def _one(self, prompt: list[int]) -> tuple[int, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            body = json.dumps({"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}}).encode()
            head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            top = await reader.readuntil(b"\r\n\r\n")
            answer = await reader.read()
            return int(top[9:12]), json.loads(answer)
        finally:
            writer.close()

    def check(self, *refusals: int) -> dict[int | str, int]:
        """Every request was answered with its own answer, or refused in one of these ways with a reason."""
        counts: dict[int | str, int] = {}
        for status, body, prompt in zip(self.statuses, self.bodies, self.prompts, strict=True):
            counts[status] = counts.get(status, 0) + 1
            if status == 200:
                assert body["meta_info"]["sum"] == sum(prompt)
            else:
                assert status in refusals, (status, body)
                assert body["error"]["message"]
        return counts


def prompts(count: int, length: int = 200, shared: int = 100) -> list[list[int]]:
    """Prompts in groups of ten with the same beginning."""
    return [
        [1 + group] * shared + [number % 1000 + token for token in range(length - shared)]
        for number in range(count)
        for group in (number // 10,)
    ]
