"""Faults across nodes, on processes: every request is answered once, correctly, or refused with a reason."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx

from asyncep_sgl.process.ports import free_port
from router_http.harness import Load, NullWorker, RouterProcess, prompts, wait_for

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]


def run_beside(load: Load) -> threading.Thread:
    """The load in a thread of its own, so that the test can do harm meanwhile."""
    thread = threading.Thread(target=lambda: asyncio.run(load.run()), daemon=True)
    thread.start()
    return thread


def finish(thread: threading.Thread) -> None:
    thread.join(90)
    assert not thread.is_alive()


def test_killed_worker_loses_nothing_and_comes_back(null_worker: Workers, router: Routers) -> None:
    first, second = null_worker(ranks=2), null_worker()
    for worker in (first, second):
        worker.tell("close")
    process = router(first.url, second.url).ready(2)
    load = Load(process.port, prompts(300))
    thread = run_beside(load)
    wait_for(lambda: first.counts["parked"] > 20 and second.counts["parked"] > 10, "both at work")
    first.kill()
    second.tell("open")
    finish(thread)
    assert load.check() == {200: 300}
    state = process.worker(first.url)
    assert not state["is_healthy"]
    # It comes back on the same port with another number of ranks.
    null_worker(ranks=3, port=first.port)
    process.ready(2)
    assert len(process.worker(first.url)["ranks"]) == 3
    again = asyncio.run(Load(process.port, prompts(100)).run())
    assert again.check() == {200: 100}


def test_hanging_worker(null_worker: Workers, router: Routers) -> None:
    good, bad = null_worker(), null_worker()
    flags = "--request-timeout-secs 2 --cb-failure-threshold 3 --retry-max-backoff-ms 200"
    process = router(good.url, bad.url, flags=flags + " --policy round_robin").ready(2)
    bad.tell("mode", "hang")
    load = asyncio.run(Load(process.port, prompts(40)).run())
    assert load.check() == {200: 40}
    assert process.worker(bad.url)["circuit_breaker"] == "open"


def test_hanging_worker_is_found_by_health_checks(null_worker: Workers, router: Routers) -> None:
    good, bad = null_worker(), null_worker()
    flags = "--health-check-interval-secs 1 --health-check-timeout-secs 1 --health-failure-threshold 2"
    process = router(good.url, bad.url, flags=flags).ready(2)
    bad.tell("mode", "hang")
    # No request times out within the test: those sent to it are let go when the checks fail.
    load = asyncio.run(Load(process.port, prompts(60)).run())
    assert load.check() == {200: 60}
    wait_for(lambda: process.worker(bad.url)["phase"] == "unhealthy", "found out")
    bad.tell("mode", "ok")
    process.ready(2)


def test_worker_answering_500(null_worker: Workers, router: Routers) -> None:
    good, bad = null_worker(), null_worker()
    flags = "--policy round_robin --cb-failure-threshold 5 --cb-timeout-duration-secs 1 --cb-success-threshold 1"
    process = router(good.url, bad.url, flags=flags).ready(2)
    bad.tell("mode", "500")
    load = asyncio.run(Load(process.port, prompts(100), clients=20).run())
    assert load.check() == {200: 100}
    metrics = process.metrics()
    assert metrics[f'smg_worker_cb_transitions_total{{from="closed",to="open",worker="{bad.url}"}}'] >= 1
    assert sum(value for name, value in metrics.items() if name.startswith("smg_worker_retries_total")) >= 5
    bad.tell("mode", "ok")

    def closed() -> bool:
        process.post("/generate", {"input_ids": [1, 2]})
        return process.worker(bad.url)["circuit_breaker"] == "closed"

    wait_for(closed, "circuit closed")


def test_only_failing_workers_are_an_error_with_a_reason(null_worker: Workers, router: Routers) -> None:
    bad = null_worker()
    process = router(bad.url, flags="--retry-max-backoff-ms 10 --cb-failure-threshold 1").ready(1)
    bad.tell("close")
    bad.tell("mode", "503")
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(process.post, "/generate", {"input_ids": [1]})
        wait_for(lambda: bad.counts["parked"] == 1, "under way")
        bad.tell("open")
        answer = future.result()
    # The worker's own words. It fails the router's question too, so the circuit opens before all attempts are used.
    assert answer.status_code == 503
    assert 1 <= bad.counts["seen"] <= 6

    def refused() -> bool:
        error: dict[str, str] = process.post("/generate", {"input_ids": [1]}).json()["error"]
        return error.get("code") == "no_available_workers"

    wait_for(refused, "circuit open")


def test_workers_come_and_go_while_serving(null_worker: Workers, router: Routers) -> None:
    first, second = null_worker(), null_worker(ranks=2)
    first.tell("close")
    process = router(first.url, "http://127.0.0.1:1").ready(1)
    load = Load(process.port, prompts(200))
    thread = run_beside(load)
    wait_for(lambda: first.counts["parked"] > 20, "the first at work")
    added = httpx.post(process.url + "/workers", json={"url": second.url})
    assert added.status_code == 202
    assert httpx.post(process.url + "/workers", json={"url": second.url}).status_code == 409
    process.ready(2)
    wait_for(lambda: second.counts["prompts"] > 0, "the second at work")
    removed = httpx.post(process.url + f"/remove_worker?url={first.url}")
    assert removed.status_code == 200
    assert process.worker(first.url)["phase"] == "draining"
    first.tell("open")
    finish(thread)
    assert load.check() == {200: 200}
    wait_for(lambda: first.url not in httpx.get(process.url + "/list_workers").json()["urls"], "removed")
    seen = first.counts["seen"]
    assert process.post("/generate", {"input_ids": [1]}).status_code == 200
    assert first.counts["seen"] == seen
    ident = added.json()["worker_id"]
    assert httpx.get(process.url + f"/workers/{ident}").json()["dp_size"] == 2
    assert httpx.delete(process.url + "/workers/nobody").status_code == 404
    assert httpx.delete(process.url + f"/workers/{ident}").status_code == 202


def test_sigterm_under_load_drains(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    worker.tell("close")
    process = router(worker.url, flags="--threshold-tokens 2000").ready(1)
    load = Load(process.port, prompts(100))
    with httpx.Client(base_url=process.url) as open_connection:
        assert open_connection.get("/liveness").status_code == 200
        thread = run_beside(load)
        wait_for(lambda: process.state()["active"] == 100, "all received")
        assert process.state()["placement"]["pending"] > 0  # some wait in the router
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining" in process.log.read_text(), "draining")
        refused = open_connection.post("/generate", json={"input_ids": [1]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    worker.tell("open")
    finish(thread)
    assert load.check() == {200: 100}
    assert process.process.wait(30) == 0


def test_slow_clients_hold_nobody_up(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags="--max-concurrent-requests 2 --queue-size 50").ready(1)
    body = json.dumps({"input_ids": [1, 2, 3]}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    slow = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(5)]
    for connection in slow:
        connection.sendall(head + body[:5])
    load = asyncio.run(Load(process.port, prompts(40), clients=10).run())
    assert load.check() == {200: 40}
    for connection in slow:
        connection.sendall(body[5:])
        assert b'"sum":6' in connection.recv(65536)
        connection.close()


def test_client_that_goes_away_frees_its_rank(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    worker.tell("close")
    process = router(worker.url, flags="--threshold-tokens 100").ready(1)
    body = json.dumps({"input_ids": list(range(150))}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    clients = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(6)]
    for client in clients:
        client.sendall(head + body)
    wait_for(lambda: process.state()["active"] == 6 and process.state()["placement"]["pending"] > 0, "some pend")
    for client in clients:
        client.close()
    wait_for(lambda: process.state()["active"] == 0, "nobody waits")
    state = process.state()["placement"]
    assert state["pending"] == 0
    assert all(rank["outstanding_flops"] == 0 for rank in state["ranks"].values())
    wait_for(lambda: worker.counts["parked"] == 0, "the worker was told")


def test_two_thousand_clients_at_once(null_worker: Workers, router: Routers) -> None:
    workers = [null_worker(ranks=2), null_worker()]
    flags = "--max-concurrent-requests 300 --queue-size 700 --queue-timeout-secs 30"
    process = router(*(worker.url for worker in workers), flags=flags).ready(2)
    load = asyncio.run(Load(process.port, prompts(2000, length=50, shared=20)).run())
    counts = load.check(429, 408)
    assert counts[200] >= 1000
    state = process.state()
    assert (state["active"], state["queued"], state["placement"]["pending"]) == (0, 0, 0)


def test_queue_full_and_queue_timeout(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    worker.tell("close")
    flags = "--max-concurrent-requests 2 --queue-size 3 --queue-timeout-secs 1"
    process = router(worker.url, flags=flags).ready(1)
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(process.post, "/generate", {"input_ids": [1]}) for _ in range(8)]
        wait_for(lambda: sum(future.done() for future in futures) == 6, "three refused, three timed out")
        worker.tell("open")
        statuses = sorted(future.result().status_code for future in futures)
    assert statuses == [200, 200, 408, 408, 408, 429, 429, 429]


def test_requests_wait_for_a_worker_that_starts_late(null_worker: Workers, router: Routers) -> None:
    port = free_port()
    process = router(f"http://127.0.0.1:{port}")
    wait_for(process.listening, "listening without any worker")
    assert httpx.get(process.url + "/readiness").status_code == 503
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(process.post, "/generate", {"input_ids": [4, 5]})
        wait_for(lambda: process.state()["active"] == 1, "waiting")
        null_worker(port=port)
        assert future.result().json()["meta_info"]["sum"] == 9
