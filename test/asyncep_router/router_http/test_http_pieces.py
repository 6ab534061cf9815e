"""The pure parts: circuit breaker, backoff, admission, flags, plans, scores."""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections.abc import Sequence
from dataclasses import fields

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_router.errors import ConfigError
from asyncep_router.http.admission import Admission, Verdict
from asyncep_router.http.breaker import Breaker, BreakerSettings, BreakerState
from asyncep_router.http.flags import FOREIGN, Support, parse
from asyncep_router.http.generate import GenerateBatch, plan_generate
from asyncep_router.http.options import RouterOptions
from asyncep_router.http.plans import Plan, bytes_prompt, cached_tokens
from asyncep_router.http.plans import parse as parse_body
from asyncep_router.http.probe import read
from asyncep_router.http.request_ids import request_id
from asyncep_router.http.retry import RetryPolicy
from asyncep_router.http.score import Score, plan_score, score_row
from asyncep_router.http.tokenizer import LocalTokenizer, TokenizeError, Tokenizer, WorkerTokenizer
from asyncep_router.http.upstream import make_session
from asyncep_router.http.worker import Worker
from asyncep_router.launch_server import parse as parse_launch

# Breaker


def test_breaker_opens_and_recovers() -> None:
    breaker = Breaker(BreakerSettings(failures=3, successes=2, timeout=60, window=120))
    for at in (0.0, 1.0):
        assert breaker.record(False, at) is BreakerState.CLOSED
    assert breaker.record(False, 2.0) is BreakerState.OPEN
    assert breaker.next_change() == 62.0
    assert breaker.advance(61.9) is BreakerState.OPEN
    assert breaker.advance(62.0) is BreakerState.HALF_OPEN
    assert breaker.record(True, 63.0) is BreakerState.HALF_OPEN
    assert breaker.record(True, 64.0) is BreakerState.CLOSED


def test_breaker_reopens_on_trial_failure_and_forgets_old_failures() -> None:
    breaker = Breaker(BreakerSettings(failures=2, successes=1, timeout=10, window=5))
    breaker.record(False, 0.0)
    assert breaker.record(False, 6.0) is BreakerState.CLOSED  # the first is out of the window
    assert breaker.record(False, 7.0) is BreakerState.OPEN
    assert breaker.advance(17.0) is BreakerState.HALF_OPEN
    assert breaker.record(False, 18.0) is BreakerState.OPEN
    assert breaker.next_change() == 28.0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 30)), max_size=60))
def test_breaker_opens_only_on_failures_in_a_row(events: list[tuple[bool, float]]) -> None:
    settings = BreakerSettings(failures=3, successes=2, timeout=20, window=40)
    breaker = Breaker(settings)
    now, row = 0.0, 0
    for success, gap in events:
        now += gap
        before = breaker.advance(now)
        after = breaker.record(success, now)
        row = 0 if success else row + 1
        if before is BreakerState.CLOSED and after is BreakerState.OPEN:
            assert row >= settings.failures
        if before is BreakerState.OPEN:
            assert after is BreakerState.OPEN
            row = 0
        if before is BreakerState.HALF_OPEN and not success:
            assert after is BreakerState.OPEN
        assert (breaker.next_change() is None) == (after is not BreakerState.OPEN)


def test_breaker_can_be_off() -> None:
    breaker = Breaker(BreakerSettings(failures=1, enabled=False))
    assert breaker.record(False, 0.0) is BreakerState.CLOSED


# Backoff


@given(st.integers(0, 4), st.floats(0, 1))
def test_backoff_grows_within_its_jitter(attempt: int, draw: float) -> None:
    delay = RetryPolicy().delay(attempt, draw)
    base = 0.05 * 1.5**attempt
    assert delay is not None
    assert base * 0.8 - 1e-12 <= delay <= base * 1.2 + 1e-12


def test_backoff_ends_and_is_bounded() -> None:
    assert RetryPolicy().delay(5, 0.5) is None
    assert RetryPolicy(retries=10_000, multiplier=3).delay(9_999, 1.0) == 30.0
    with pytest.raises(ConfigError, match="--retry-jitter-factor 2: must be at most 1"):
        RouterOptions(retry_jitter_factor=2)


# Admission


def test_admission_queues_refuses_and_expires() -> None:
    admission = Admission(limit=1, queue=1, patience=10)
    assert admission.ask(0, 0.0) is Verdict.ADMITTED
    assert admission.ask(1, 1.0) is Verdict.QUEUED
    assert admission.ask(2, 2.0) is Verdict.FULL
    assert admission.next_wakeup(2.0) == 11.0
    assert admission.poll(11.0) == ([], [1])
    assert admission.ask(3, 12.0) is Verdict.QUEUED
    admission.leave(0)
    assert admission.poll(13.0) == ([3], [])


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.one_of(st.none(), st.floats(0.5, 20)),
    st.lists(st.tuples(st.sampled_from(["ask", "leave", "wait"]), st.floats(0, 3)), max_size=80),
)
def test_admission_keeps_its_bounds(
    limit: int, queue: int, rate: float | None, events: list[tuple[str, float]]
) -> None:
    admission = Admission(limit, queue, 5.0, rate)
    now, asked, active, admitted = 0.0, 0, [], 0
    for kind, gap in events:
        now += gap
        if kind == "ask":
            verdict = admission.ask(asked, now)
            if verdict is Verdict.ADMITTED:
                active.append(asked)
                admitted += 1
            asked += 1
        elif kind == "leave" and active:
            admission.leave(active.pop(0))
        polled = admission.poll(now)
        assert polled.admitted == sorted(polled.admitted)
        active += polled.admitted
        admitted += len(polled.admitted)
        assert admission.active == len(active) <= limit
        assert admission.waiting <= queue
        if rate is not None:
            assert admitted <= limit + rate * now + 1e-6
        if admission.waiting:
            wakeup = admission.next_wakeup(now)
            assert wakeup is not None
            if len(active) < limit:
                # Whoever wakes up then finds something to do.
                assert any(admission.poll(wakeup + 1e-6))
                return


# Flags


def test_defaults_are_sglang_routers() -> None:
    expected = {
        "host": "0.0.0.0",
        "port": 30000,
        "cache_threshold": 0.3,
        "balance_abs_threshold": 64,
        "balance_rel_threshold": 1.5,
        "max_tree_size": 67108864,
        "worker_startup_timeout_secs": 1800,
        "worker_startup_check_interval": 30,
        "prometheus_port": 29000,
        "metrics_host": "0.0.0.0",
        "request_timeout_secs": 1800,
        "shutdown_grace_period_secs": 180,
        "max_concurrent_requests": -1,
        "queue_size": 100,
        "queue_timeout_secs": 60,
        "rate_limit_tokens_per_second": None,
        "retry_max_retries": 5,
        "retry_initial_backoff_ms": 50,
        "retry_max_backoff_ms": 30000,
        "retry_backoff_multiplier": 1.5,
        "retry_jitter_factor": 0.2,
        "health_failure_threshold": 3,
        "health_success_threshold": 2,
        "health_check_timeout_secs": 5,
        "health_check_interval_secs": 60,
        "health_check_endpoint": "/health",
        "cb_failure_threshold": 10,
        "cb_success_threshold": 3,
        "cb_timeout_duration_secs": 60,
        "cb_window_duration_secs": 120,
    }
    options = parse([])
    assert {name: getattr(options, name) for name in expected} == expected
    assert options == RouterOptions()


def test_every_setting_has_a_flag() -> None:
    for setting in fields(RouterOptions):
        flag = "--" + setting.name.replace("_", "-")
        if setting.default is False:
            assert getattr(parse([flag]), setting.name) is True
        elif isinstance(setting.default, int | float) and not isinstance(setting.default, bool):
            assert getattr(parse([flag, "1"]), setting.name) == 1


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign.name)
def test_foreign_flags(foreign: object, caplog: pytest.LogCaptureFixture) -> None:
    flag = next(entry for entry in FOREIGN if entry is foreign)
    line = [f"--{flag.name}"] + ([] if flag.takes == "" else ["1"])
    if flag.support is Support.REFUSED:
        with pytest.raises(ConfigError, match=flag.name):
            parse(line)
    else:
        with caplog.at_level(logging.WARNING):
            assert parse(line) == RouterOptions()
        assert flag.name in caplog.text
    if flag.harmless is not None:
        assert parse([f"--{flag.name}", flag.harmless]) == RouterOptions()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--policy manual", "manual"),
        ("--policy fastest", "fastest"),
        ("--cb-failure-threshold 0", "--cb-failure-threshold 0: must be at least 1"),
        ("--retry-jitter-factor 7", "--retry-jitter-factor 7.0: must be at most 1"),
        ("--queue-size -1", "queue-size"),
        ("--tls-cert-path x", "tls-key-path"),
        ("--affinity 3", "--affinity 3.0: must be at most 1"),
    ],
)
def test_bad_values_are_named(line: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(line.split())


def test_launch_server_splits_its_flags() -> None:
    line = "--model-path m --dp-size 2 --port 8000 --router-policy random --router-workers 2 --mem-fraction-static 0.5"
    options = parse_launch(line.split())
    assert options.router.policy == "random"
    assert options.router.port == 8000
    assert options.router.worker_urls == ("http://127.0.0.1:31000", "http://127.0.0.1:31001")
    first, second = options.commands
    assert first[:3] == ("-m", "asyncep", "serve")
    assert first[-4:] == ("--dp-size", "2", "--mem-fraction-static", "0.5")
    assert second[second.index("--port") + 1] == "31001"
    with pytest.raises(ConfigError, match="router-nonsense"):
        parse_launch(["--model-path", "m", "--router-nonsense"])


# What is read from others


def test_probe_reads_old_and_new_servers() -> None:
    info = read({"model_path": "m", "is_generation": True}, {"dp_size": 4, "max_total_num_tokens": 1000}, {})
    assert (info.ranks, info.cache_tokens, info.caches, info.multi_item) == (4, 1000, True, False)
    bare = read({}, {}, {})
    assert (bare.ranks, bare.cache_tokens, bare.model_path) == (1, None, None)
    ours = {"threshold_flops_per_layer": 5e9, "gathers": []}
    assert not read({}, {}, ours).gathers
    assert read({}, {}, {**ours, "gathers": [{"rank": 0}]}).gathers


def test_cached_tokens_cannot_be_imitated() -> None:
    text = 'he said "cached_tokens":7'
    assert cached_tokens(orjson.dumps({"text": text, "meta_info": {"cached_tokens": 3}})) == 3
    assert cached_tokens(orjson.dumps({"text": text})) is None


@given(st.text(max_size=300))
def test_request_ids_fit_headers_and_logs(given_id: str) -> None:
    found = request_id({"x-request-id": given_id}, "/generate")
    assert found.isascii()
    assert found.isprintable()
    assert 0 < len(found) <= 256


def test_request_ids() -> None:
    assert request_id({"x-request-id": "a"}, "/generate") == "a"
    assert request_id({"x-request-id": "a", "x-mine": "b"}, "/generate", ("x-mine",)) == "b"
    made = {request_id({}, "/generate") for _ in range(100)}
    assert len(made) == 100
    assert all(ident.startswith("gnt-") for ident in made)


@given(st.binary(max_size=200), st.binary(max_size=50), st.binary(max_size=50))
def test_bytes_that_begin_alike_match_alike(start: bytes, one: bytes, other: bytes) -> None:
    whole = len(start) // 4
    assert bytes_prompt(start + one).token_ids[:whole] == bytes_prompt(start + other).token_ids[:whole]


# Plans


def generate(raw: bytes, tokenizer: Tokenizer | None) -> Plan:
    return asyncio.run(plan_generate(raw, parse_body(raw), tokenizer))


def score(raw: bytes, tokenizer: Tokenizer | None, *, plain: bool) -> Plan:
    return asyncio.run(plan_score(raw, parse_body(raw), tokenizer, plain=plain))


class Words:
    """A tokenizer: one token a character."""

    kind = "local"
    vocabulary: int | None = 1000

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        return [array("q", map(ord, text)) for text in texts]


def test_single_prompt_is_forwarded_byte_for_byte() -> None:
    raw = b' {"input_ids":[5, 6,7], "x": 1.50}'
    plan = generate(raw, None)
    assert plan.body((0,), None) == raw
    pinned = orjson.loads(plan.body((0,), 3))
    assert pinned == {"routed_dp_rank": 3, "input_ids": [5, 6, 7], "x": 1.5}
    assert list(plan.prompts[0].token_ids) == [5, 6, 7]


def test_text_is_tokenized_once() -> None:
    plan = generate(b'{"text":"ab","sampling_params":{"max_new_tokens":0}}', Words())
    assert orjson.loads(plan.body((0,), None)) == {"input_ids": [97, 98], "sampling_params": {"max_new_tokens": 0}}
    image = b'{"text":"ab","image_data":"x"}'
    assert generate(image, Words()).body((0,), None) == image


def test_batch_is_cut_along_its_lists() -> None:
    fields = {
        "input_ids": [[1], [2], [3]],
        "rid": "r",
        "token_ids_logprob": [[7], [8], [9]],
        "sampling_params": {"max_new_tokens": 0},
        "top_logprobs_num": [0, 1, 2],
    }
    plan = generate(orjson.dumps(fields), None)
    assert isinstance(plan, GenerateBatch)
    assert orjson.loads(plan.body((0, 2), 1)) == {
        "input_ids": [[1], [3]],
        "rid": ["r_0", "r_2"],
        "token_ids_logprob": [[7], [9]],
        "sampling_params": {"max_new_tokens": 0},
        "top_logprobs_num": [0, 2],
        "routed_dp_rank": 1,
    }


@pytest.mark.parametrize(
    "more",
    [
        {"stream": True},
        {"sampling_params": {"n": 2}},
        {"routed_dp_rank": 0},
        {"some_new_field": [1, 2]},
        {"top_logprobs_num": [1]},
    ],
    ids=str,
)
def test_batch_that_cannot_be_cut_goes_whole(more: dict[str, object]) -> None:
    raw = orjson.dumps({"input_ids": [[1, 2], [3]], **more})
    plan = generate(raw, None)
    assert not plan.joined
    assert plan.body((0,), None) == raw
    assert list(plan.prompts[0].token_ids) == [1, 2, 3]


def test_nonsense_is_left_to_the_worker() -> None:
    for raw in (b'{"input_ids":["a"]}', b'{"input_ids":[]}', b'{"input_ids":[[1],[]]}', b"{}", b'{"input_ids":3}'):
        plan = generate(raw, Words())
        assert plan.body((0,), None) == raw
        assert orjson.loads(plan.body((0,), 2)) == {"routed_dp_rank": 2, **orjson.loads(raw)}


# Scores


def test_score_items_become_prompts() -> None:
    raw = orjson.dumps({"query": "q", "items": ["a", "b"], "label_token_ids": [3, 4], "model": "m"})
    plan = score(raw, Words(), plain=True)
    assert isinstance(plan, Score)
    assert [list(prompt.token_ids) for prompt in plan.prompts] == [[113, 97], [113, 98]]
    assert orjson.loads(plan.body((1,), 0))["token_ids_logprob"] == [[3, 4]]


@pytest.mark.parametrize(
    "change",
    [
        {"label_token_ids": [1000]},
        {"label_token_ids": [3, 3]},
        {"label_token_ids": [True]},
        {"temperature": 0},
        {"temperature": 2.0},
        {"items": []},
        {"items": [[1], "a"]},
        {"query": [1]},
        {"score_extraction_token": "x"},
        {"apply_softmax": "yes"},
    ],
    ids=str,
)
def test_unusual_scores_are_forwarded(change: dict[str, object]) -> None:
    raw = orjson.dumps({"query": "q", "items": ["a", "b"], "label_token_ids": [3, 4], **change})
    plan = score(raw, Words(), plain=True)
    assert not plan.joined
    assert plan.body((0,), 1) == raw  # /v1/score has no field for a rank


def test_a_small_body_cannot_ask_for_very_much() -> None:
    """The query stands before every item: a body of a megabyte must not become gigabytes here."""
    small = {"query": "q" * 1_000_000, "items": ["a"] * 15, "label_token_ids": [1]}
    assert score(orjson.dumps(small), Words(), plain=True).joined
    for change in (
        {"items": ["a"] * 16_000},
        {"query": "", "items": ["a"] * 10_000, "label_token_ids": list(range(2000))},
        {"query": [1] * 20_000, "items": [[1]] * 1000},
    ):
        raw = orjson.dumps({**small, **change})
        plan = score(raw, Words(), plain=True)
        assert not plan.joined
        assert plan.body((0,), None) == raw


def test_long_texts_take_turns_and_too_long_ones_are_left_to_workers() -> None:
    sizes: list[int] = []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return [len(text)]

    tokenizer = LocalTokenizer(encode, 1000)
    texts = ["a" * (1000 + number) for number in range(500)]
    found = asyncio.run(tokenizer.encode(texts))
    assert [list(ids) for ids in found] == [[len(text)] for text in texts]
    sizes.clear()
    with pytest.raises(TokenizeError):
        asyncio.run(tokenizer.encode(["a", "b" * 1_000_001]))
    assert not sizes


def test_a_worker_that_does_not_tokenize_is_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncep_router.http.tokenizer._SECONDS", 0.2)
    connections = 0

    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    async def run() -> None:
        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        worker = Worker(f"http://127.0.0.1:{port}", Breaker(BreakerSettings()))
        async with server, make_session() as session:
            tokenizer = WorkerTokenizer(session, worker, list)
            for _ in range(5):
                with pytest.raises(TokenizeError):
                    await tokenizer.encode(["text"])

    asyncio.run(run())
    assert connections == 1


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=6), st.floats(0.01, 10))
def test_softmax_scores_sum_to_one(logprobs: list[float], temperature: float) -> None:
    assert math.isclose(sum(score_row(logprobs, True, temperature)), 1, rel_tol=1e-9)
    assert score_row(logprobs, False, 1.0) == [math.exp(value) for value in logprobs]
