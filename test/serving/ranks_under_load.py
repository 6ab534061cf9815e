"""What tests of dying ranks share: clients that keep asking, and what the router says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from server import Server

NOTHING_NEW = {"max_new_tokens": 0}


def router(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(server.url + "/router/state", timeout=30).json()
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + seconds, "it did not happen"
        time.sleep(0.02)
    return time.monotonic() - began


def rank_pids(server: Server) -> list[int]:
    return [rank["pid"] for rank in server.status()["ranks"]]


def ask(server: Server, tokens: list[int], **fields: Any) -> httpx.Response:
    return server.post("/generate", {"input_ids": tokens, "sampling_params": NOTHING_NEW, **fields})


def prompt(number: int, length: int = 60) -> list[int]:
    return [(7 * i + 31 * number) % 500 + 3 for i in range(length)]


def in_flight(server: Server, rank: int) -> int:
    found: int = router(server)["ranks"][str(rank)]["requests_in_flight"]
    return found


class Load:
    """Clients that ask one prompt after another until told to stop."""

    def __init__(self, server: Server, clients: int = 8) -> None:
        self._server = server
        self._stop = threading.Event()
        self.statuses: list[int | str] = []
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self, client: int) -> None:
        number = 1000 * client
        while not self._stop.is_set():
            number += 1
            try:
                self.statuses.append(ask(self._server, prompt(number)).status_code)
            except httpx.HTTPError as error:
                self.statuses.append(type(error).__name__)
