"""Requests that make workers fail, on processes: they are tried at most twice, and nobody else is refused for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from router_http.harness import NullWorker, RouterProcess, wait_for
from router_http.null_worker import POISON, WEAK

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]

# A circuit that opens at the slightest, and never closes within a test.
TOUCHY = (
    "--cb-failure-threshold 1 --cb-timeout-duration-secs 3600 --retry-initial-backoff-ms 1 --retry-max-backoff-ms 5"
)
GOOD = {"input_ids": [4, 5]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[NullWorker], RouterProcess]]:
    """A router with touchy circuits before two workers."""
    workers = [NullWorker(), NullWorker()]
    log = tmp_path_factory.mktemp("poison") / "log"
    process = RouterProcess(*(worker.url for worker in workers), flags=f"{TOUCHY} --request-timeout-secs 1", log=log)
    try:
        yield workers, process.ready(2)
    finally:
        process.stop()
        for worker in workers:
            worker.stop()


def seen(workers: list[NullWorker]) -> int:
    return sum(worker.counts["seen"] for worker in workers)


def circuits(process: RouterProcess) -> set[str]:
    return {worker["circuit_breaker"] for worker in process.state()["workers"]}


@pytest.mark.parametrize(
    ("first", "status", "attempts"),
    [
        (POISON + 500, 500, 2),
        (POISON + 501, 501, 2),
        (POISON + 599, 599, 2),
        (POISON + 2, 500, 1),  # quarantined
        (POISON, 502, 2),  # breaks the connection
        (POISON + 1, 504, 2),  # never answers
        (POISON + 503, 503, 6),
        (POISON + 429, 429, 6),
        (POISON + 404, 404, 1),
    ],
)
@pytest.mark.parametrize("form", ["single", "batch", "stream"])
def test_poison_is_its_clients_alone(
    pair: tuple[list[NullWorker], RouterProcess], first: int, status: int, attempts: int, form: str
) -> None:
    workers, process = pair
    body = {"input_ids": [[first, 7]] if form == "batch" else [first, 7], "stream": form == "stream"}
    for _ in range(1 if status == 504 else 2):
        before = seen(workers)
        answer = process.post("/generate", body)
        assert answer.status_code == status
        assert seen(workers) - before == attempts
        good = process.post("/generate", GOOD)
        assert good.json()["meta_info"]["sum"] == 9
    assert circuits(process) == {"closed"}


def test_a_flood_of_poison_beside_good_requests(pair: tuple[list[NullWorker], RouterProcess]) -> None:
    _, process = pair
    bad = [POISON + 500, POISON, POISON + 503, POISON + 2, POISON + 400]

    def send(number: int) -> int:
        return process.post("/generate", {"input_ids": [bad[number // 2 % 5] if number % 2 else 3, 1]}).status_code

    with ThreadPoolExecutor(16) as threads:
        statuses = list(threads.map(send, range(160)))
    assert set(statuses[::2]) == {200}
    assert circuits(process) == {"closed"}


def test_a_lone_worker_outlives_poison_and_is_found_when_broken(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags=TOUCHY).ready(1)
    for first in (POISON + 500, POISON, POISON + 503) * 3:
        assert process.post("/generate", {"input_ids": [first]}).status_code >= 500
        assert process.post("/generate", GOOD).status_code == 200
    assert circuits(process) == {"closed"}
    # Broken for everybody, it fails the router's own question as well.
    worker.tell("mode", "500")

    def found() -> bool:
        error: dict[str, str] = process.post("/generate", GOOD).json()["error"]
        return error.get("code") == "no_available_workers"

    wait_for(found, "circuit open")


def test_a_worker_that_fails_what_others_serve_is_found(null_worker: Workers, router: Routers) -> None:
    good, weak = null_worker(), null_worker(flags="--weak")
    process = router(good.url, weak.url, flags=TOUCHY + " --policy round_robin").ready(2)
    # It answers the router's question, and still fails what the other one serves.
    for _ in range(4):
        assert process.post("/generate", {"input_ids": [WEAK, 1]}).status_code == 200
    assert process.worker(weak.url)["circuit_breaker"] == "open"
    assert process.worker(good.url)["circuit_breaker"] == "closed"


def test_rerank_that_no_worker_can_serve(pair: tuple[list[NullWorker], RouterProcess]) -> None:
    """What ended a fleet once: a client's error that servers answer with 500."""
    workers, process = pair
    for worker in workers:
        worker.tell("mode", "ok")
    before = seen(workers)
    body = {"query": "cats", "documents": ["a", "b"], "input_ids": [POISON + 500]}
    for _ in range(5):
        assert process.post("/v1/embeddings", {**body, "input": "x"}).status_code == 500
    assert seen(workers) - before == 10
    assert circuits(process) == {"closed"}
    assert process.post("/generate", GOOD).status_code == 200


def test_the_router_asks_only_while_it_wonders(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url).ready(1)
    for _ in range(5):
        process.post("/generate", GOOD)
        httpx.post(process.url + "/generate", content=b'{"input_ids":[%d]}' % (POISON + 400))
    assert worker.counts["seen"] == 10
    assert worker.counts["questions"] == 0
    process.post("/generate", {"input_ids": [POISON + 500]})
    wait_for(lambda: worker.counts["questions"] == 1, "asked")
