"""Workers that are slow to answer about themselves: busy ones stay, stuck ones are found, and nobody waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from router_http.harness import NullWorker, RouterProcess, wait_for

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]

CHECKS = "--health-check-interval-secs 1 --health-check-timeout-secs 1 --health-failure-threshold 2"


def test_a_busy_worker_stays_and_a_silent_one_does_not(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags=CHECKS).ready(1)
    statuses: list[int] = []
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            statuses.append(process.post("/generate", {"input_ids": [1, 2]}).status_code)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    # It answers requests and no health check, as a server does whose checks queue behind its work.
    worker.tell("mode", "deaf")
    name = f'smg_worker_health_checks_total{{result="busy",worker="{worker.url}"}}'
    wait_for(lambda: process.metrics().get(name, 0) >= 5, "five checks unanswered")
    assert process.worker(worker.url)["phase"] == "ready"
    over.set()
    thread.join(60)
    assert set(statuses) == {200}
    # Nothing comes any more.
    wait_for(lambda: process.worker(worker.url)["phase"] == "unhealthy", "found out")
    worker.tell("mode", "ok")
    process.ready(1)


def test_a_worker_that_does_not_say_what_it_is_holds_nobody_up(null_worker: Workers, router: Routers) -> None:
    mute, good = null_worker(flags="--mode deaf_info"), null_worker()
    process = router(mute.url, good.url, flags="--health-check-timeout-secs 1").ready(1)
    assert process.post("/generate", {"input_ids": [4, 5]}).json()["meta_info"]["sum"] == 9
    wait_for(lambda: "/server_info" in str(process.worker(mute.url)["last_error"]), "said why")
    mute.tell("mode", "ok")
    process.ready(2)
    # Later too: the question goes to another one.
    for worker, other in ((mute, good), (good, mute)):
        worker.tell("mode", "deaf_info")
        other.tell("mode", "ok")
        assert process.get("/server_info").status_code == 200
    mute.tell("mode", "deaf_info")
    answer = process.get("/server_info")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "worker_unreachable")


def test_a_dropped_connection_takes_no_worker_out(null_worker: Workers, router: Routers) -> None:
    """A check tells that it lives, and others' requests on it go on meanwhile."""
    from router_http.null_worker import POISON

    worker = null_worker()
    process = router(worker.url).ready(1)
    worker.tell("close")
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(process.post("/generate", {"input_ids": [3]}).status_code))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: worker.counts["parked"] == 5, "under way")
    worker.tell("open")
    assert process.post("/generate", {"input_ids": [POISON]}).status_code == 502
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 5
    assert process.worker(worker.url)["phase"] == "ready"
