"""What the suites judge by, without a server: the oracle, the shrinker, clients' tallies, growth, claims."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile.cases import Case
from hostile.chaos_batches import checked
from hostile.honest import Clients, Question, Tally, agree, judged, questions
from hostile.oracle import Outcome, kind_of, verdict
from hostile.schemathesis_peer import counted, summary
from hostile.shrink import curl, simpler, size, smallest
from hostile.watch import Sample, growth, own_bytes
from hostile.wire import send
from hypothesis import given
from hypothesis import strategies as st

ASKED = Case("POST", "/generate", b'{"a": 1}', (("a", "1"),))
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("outcome", "wrong"),
    [
        (Outcome(200, JSON, b'{"a": 1}'), None),
        (Outcome(400, JSON, b'{"error": "a: too large"}'), None),
        (Outcome(503, {**JSON, "retry-after": "1"}, b'{"error": "busy"}'), None),
        (Outcome(503, JSON, b'{"error": "busy"}'), "503"),
        (Outcome(500, JSON, b'{"error": "x"}'), "500"),
        (Outcome(500, JSON, b'{"error": "quarantined: a rank died of it twice"}'), "a rank died of it"),
        (Outcome(None, error="timeout"), "no answer in time"),
        (Outcome(None, error="closed"), "no answer: closed"),
        (Outcome(200, JSON, b'{"a": NaN}'), "an answer that is no JSON"),
        (Outcome(200, JSON, b'{"a": '), "an answer that is no JSON"),
        (Outcome(200, JSON, b'{"a": "\xff"}'), "an answer that is no JSON"),
        (Outcome(200, {"content-type": "text/event-stream"}, b'data: {"a": 1}\n\ndata: [DONE]\n\n'), None),
        (
            Outcome(200, {"content-type": "text/event-stream"}, b"data: {oops\n\ndata: [DONE]\n\n"),
            "an answer that is no JSON",
        ),
        (Outcome(400, {}, b""), "400 without a reason"),
        (Outcome(400, JSON, b'{"e": "Traceback (most recent call last):"}'), "the server's insides in an answer"),
        (Outcome(200, JSON, b'{"api_key": "the-key"}'), "a key in an answer"),
    ],
)
def test_verdicts(outcome: Outcome, wrong: str | None) -> None:
    assert verdict(ASKED, outcome, ["the-key"]) == wrong


def test_what_was_not_sent_whole_is_not_judged() -> None:
    assert verdict(Case("POST", "/x", b"{}", manner="cut"), Outcome(None, error="closed")) is None


def test_faults_of_one_kind_are_one_finding() -> None:
    def kind(number: int) -> str:
        case = Case("POST", "/generate", b"", (("top_k", str(number)),))
        return kind_of(case, "500", Outcome(500, JSON, f"value {number} overflows".encode()))

    assert kind(5) == kind(99999)
    assert kind_of(ASKED, "500", Outcome(500, JSON, b"other")) != kind(5)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(json_values)
def test_every_step_of_shrinking_is_smaller(value: Any) -> None:
    assert all(size(candidate) < size(value) for candidate in simpler(value))


@given(st.dictionaries(st.sampled_from("abcdef"), json_values, max_size=5), json_values)
def test_shrinking_keeps_what_matters_and_nothing_else(others: dict[str, Any], rest: Any) -> None:
    async def still(case: Case) -> bool:
        body = json.loads(case.content)
        return isinstance(body, dict) and isinstance(body.get("bad"), dict) and body["bad"].get("n", 0) >= 2**31

    case = Case("POST", "/x", json.dumps({**others, "bad": {"n": 2**31 + 5, "more": rest}}).encode())
    found = asyncio.run(smallest(case, still, tries=2000))
    assert json.loads(found.content) == {"bad": {"n": 2**31 + 5}}


def test_shrinking_asks_no_more_often_than_it_may() -> None:
    asked = 0

    async def still(_: Case) -> bool:
        nonlocal asked
        asked += 1
        return True

    asyncio.run(smallest(Case("POST", "/x", json.dumps({"a": list(range(5000))}).encode()), still, tries=7))
    assert asked <= 7


@pytest.mark.parametrize(
    "body", ['{"a": "it\'s"}', '{"a": [' + "1," * 5000 + "1]}", "[" * 900 + "]" * 900, '{"a":"\\ud83d"}']
)
def test_a_command_sends_the_same_bytes(body: str, tmp_path: Path) -> None:
    """The shell runs it with a `curl` that writes what it was given to send."""
    program = tmp_path / "curl"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "data = sys.argv[sys.argv.index('--data-binary') + 1]\n"
        "sys.stdout.write(sys.stdin.read() if data == '@-' else data)\n"
    )
    program.chmod(0o755)
    command = curl(Case("POST", "/generate", body.encode()), "http://127.0.0.1:1")
    assert len(command) < 1500
    environment = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin", "KEY": "k"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == body


ONE = Question("/generate", {}, lambda answer: [answer["x"]])


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        (Outcome(200, JSON, b'{"x": -1.0}'), "right"),
        (Outcome(200, JSON, b'{"x": -1.5}'), "wrong"),
        (Outcome(200, JSON, b'{"y": -1.0}'), "wrong"),
        (Outcome(200, JSON, b""), "wrong"),
        (Outcome(503, JSON, b"stopping"), "refused"),
        (Outcome(500, JSON, b"quarantined"), "refused"),
        (Outcome(500, JSON, b"oops"), "lost"),
        (Outcome(503, JSON, b""), "lost"),
        (Outcome(None, error="timeout"), "lost"),
    ],
)
def test_an_honest_answer_is_right_wrong_refused_or_lost(outcome: Outcome, what: str) -> None:
    assert judged(ONE, [-1.0], outcome) == what
    tally = Tally()
    tally.note(ONE, [-1.0], outcome, 0.0)
    assert tally.summary()[what] == 1
    assert bool(tally.faults) == (what in ("wrong", "lost"))


def test_answers_agree_up_to_rounding() -> None:
    assert agree([-10.0, -2.0], [-10.001, -2.0005])
    assert not agree([-10.0, -2.0], [-10.0, -2.01])
    assert not agree([-1.0], [-1.0, -2.0])


def test_questions_are_the_same_for_the_same_seed() -> None:
    def bodies(seed: int) -> list[Any]:
        return [question.body for question in questions(10, seed)]

    assert bodies(1) == bodies(1) != bodies(2)


def test_a_batchs_lines_are_counted_once_each() -> None:
    def line(number: int, x: float, status: int = 200) -> dict[str, Any]:
        return {"custom_id": f"row-{number}", "response": {"status_code": status, "body": {"x": x}}}

    lines = [line(0, -1.0), line(1, -2.0), line(1, -2.0), line(2, -9.0), line(4, 0.0, 503)]
    found = checked(lines, 6, [ONE, ONE], [[-1.0], [-2.0]])
    assert found == {"lost": 2, "twice": 1, "right": 3, "wrong": 1, "refused": 1}


def samples(memory: Callable[[float], int]) -> list[Sample]:
    return [Sample(float(second), 1, 0, 0, 0, memory(second), 10) for second in range(0, 600, 5)]


def test_growth_is_seen_once_settled() -> None:
    assert growth(samples(lambda second: 1000 + min(second, 100)), 100) == pytest.approx(0)
    assert growth(samples(lambda second: 1000 + second), 100) == pytest.approx(0.39, abs=0.05)
    # A single jump of one sample is none.
    assert growth(samples(lambda second: 5000 if second == 300 else 1000), 100) == pytest.approx(0)
    assert growth(samples(lambda second: 1000)[:2], 0) is None


async def _served(answer: bytes, case: Case) -> Outcome:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        return await send(f"http://127.0.0.1:{port}", case)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n1\r\n!\r\n0\r\n\r\n", 200, b"ok!"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 413 Large\r\n\r\nno", 413, b"no"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", None, b""),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n", None, b""),
        (b"", None, b""),
    ],
)
def test_only_a_whole_answer_is_one(answer: bytes, status: int | None, body: bytes) -> None:
    outcome = asyncio.run(_served(answer, ASKED))
    assert (outcome.status, outcome.body) == (status, body)
    assert bool(outcome.error) == (status is None)


def test_clients_ask_until_they_are_stopped() -> None:
    async def ask() -> Tally:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"x": -1.0}')
            writer.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Clients(f"http://127.0.0.1:{port}", [ONE], [[-1.0]], None, 5) as clients:
                await clients.answered(50)
        return clients.tally

    tally = asyncio.run(ask())
    assert tally.counts["right"] >= 50
    assert tally.counts["lost"] == tally.counts["wrong"] == 0


REPORT = """
1. Test Case ID: 8M6qQG
- ST101 Server error
[500] Internal Server Error:
Reproduce with:

    curl -X POST -H 'Content-Type: application/json' -d '{"n": 2516}' http://127.0.0.1:1/a

Failures:
  ❌ ST101 Server error: 3

API Operations:
  Selected: 1/1
  Tested: 1

Test cases:
  343 generated, 1 found 1 unique failure

============================= 1 failure in 60.08s ==============================
"""


def test_schemathesis_report_is_read() -> None:
    found = summary(REPORT)
    assert found["errors"] == 0
    assert found["commands"] == [
        "curl -X POST -H 'Content-Type: application/json' -d '{\"n\": 2516}' http://127.0.0.1:1/a"
    ]
    assert summary("Test cases:\n  12 generated, 12 passed\n\n=== 1 error in 2.00s ===")["errors"] == 1


def test_schemathesis_events_are_counted_where_it_was_killed() -> None:
    def finished(*statuses: int | None) -> str:
        answers = {str(n): {"response": status and {"status_code": status}} for n, status in enumerate(statuses)}
        return json.dumps({"ScenarioFinished": {"recorder": {"interactions": answers}}})

    lines = [
        '{"ScenarioStarted": {}}',
        '{"ScenarioFinished": {"recorder": {}}}',
        finished(200, 400, 500),
        finished(None, 503),
        finished(200)[:-7],
    ]
    assert counted(lines) == {"operations": 2, "requests": 5, "failures": 2}
    assert counted([]) == {"operations": 0, "requests": 0, "failures": 0}


def test_memory_of_ones_own_is_no_part_of_a_library() -> None:
    # A process of its own: this one has the memory of all tests before, and gives some back at any time.
    script = (
        "rollup = lambda: open('/proc/self/smaps_rollup').read()\n"
        "print(rollup())\nlarge = bytearray(64 << 20)\nlarge[::4096] = b'x' * (len(large) // 4096)\nprint('--')\n"
        "print(rollup())"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before, after = (part.strip() for part in printed.split("--\n"))
    pss = next(int(line.split()[1]) << 10 for line in before.splitlines() if line.startswith("Pss:"))
    assert 0 < own_bytes(before) < pss
    assert 0.9 < (own_bytes(after) - own_bytes(before)) / (64 << 20) < 1.2
