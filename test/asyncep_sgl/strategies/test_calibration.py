"""Which prompts a server asks itself at the start, so that T is known. In a server: the groups' tests and benches."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from asyncep_sgl.strategies.asyncep.calibration import calibrate

CONTEXT = 3000


@contextmanager
def listener(status: int = 200) -> Iterator[tuple[str, list[tuple[str, dict[str, object]]]]]:
    """A server's address, and what it has been asked."""
    asked: list[tuple[str, dict[str, object]]] = []

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append((self.path, {**json.loads(body or b"{}"), "key": self.headers.get("Authorization")}))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def lengths(asked: list[tuple[str, dict[str, object]]], rank: int | None) -> list[int]:
    return [len(body["input_ids"]) for _, body in asked if "input_ids" in body and body.get("routed_dp_rank") == rank]  # type: ignore[arg-type]


def test_each_rank_computes_a_few_lengths_and_then_what_just_hides_a_gather() -> None:
    known = iter((1000, 2000))
    with listener() as (url, asked):
        calibrate(url, ranks=2, vocabulary=50, context=CONTEXT, api_key="k", hiding_tokens=lambda: next(known))
    for rank in (0, 1):
        assert lengths(asked, rank) == [256, 1024, 512, CONTEXT - 16, 850, 1150, 1000, 1700, 2300, 2000]
    assert asked[-1][0] == "/flush_cache"
    assert {body["key"] for _, body in asked} == {"Bearer k"}


def test_where_everything_hides_nothing_is_refined() -> None:
    with listener() as (url, asked):
        calibrate(url, ranks=1, vocabulary=50, context=CONTEXT, api_key=None, hiding_tokens=lambda: None)
    assert len(lengths(asked, None)) == 4


def test_a_server_that_refuses_is_served_with_t_after_the_peak(caplog: pytest.LogCaptureFixture) -> None:
    with listener(status=503) as (url, asked):
        calibrate(url, ranks=1, vocabulary=50, context=CONTEXT, api_key=None, hiding_tokens=lambda: 10)
    assert len(asked) == 1
    assert "could not be measured" in caplog.text
