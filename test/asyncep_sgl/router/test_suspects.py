"""Requests that kill ranks: each kills two at most, everybody else is answered, and the server goes on."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_moe import COST

from asyncep_router.block_view import BlockView
from asyncep_router.config import Limits
from asyncep_router.messages import BatchReport, Dispatch, Request
from asyncep_router.routing_policy import RoutingPolicy
from asyncep_sgl.process.restarts import RankDeaths
from asyncep_sgl.router.quarantine import Quarantine, Remembered
from asyncep_sgl.router.suspects import QUARANTINED, Suspects


@dataclass
class Host:
    """Ranks that compute in batches of up to three and die of what is deadly, in the forward pass or before it."""

    ranks: int
    chance: random.Random
    answers: dict[str, int] = field(default_factory=dict)
    kills: dict[str, int] = field(default_factory=dict)
    now: float = 0.0
    queues: dict[int, list[Dispatch]] = field(default_factory=dict)
    batch: int = 0

    def __post_init__(self) -> None:
        self.front = RoutingPolicy(COST, BlockView(10**6, 16), Limits(block=16, default_threshold=COST.flops(60)))
        self.suspects = Suspects(self.front, self._answer, lambda payload: str(payload.what).encode())
        for rank in range(self.ranks):
            self._join(rank)

    def _join(self, rank: int) -> None:
        self.queues[rank] = []
        self.front.rank_joined(rank)
        self.suspects.deaths.computed(rank)  # the pass that it is asked for before it gets anything

    def _answer(self, rid: str, message: str, status: int) -> None:
        assert rid not in self.answers
        assert "quarantined" in message
        self.answers[rid] = status

    def submit(self, rid: str, deadly: str | None = None, pinned: int | None = None) -> None:
        """``deadly``: "forward" or "before"; None for an honest request."""
        what = deadly or rid
        payload = SimpleNamespace(rid=rid, deadly=deadly, what=what)
        if not self.suspects.refused(payload, self.now):
            tokens = array("q", [sum(rid.encode()) % 500] * 20)
            self.front.submit(Request(rid, tokens, self.now, pinned=pinned, payload=payload), self.now)

    def turn(self) -> None:
        """The router decides, then one rank that has something to do does it."""
        self.now += 0.1
        for dispatch in [*self.suspects.step(list(self.queues), self.now), *self.front.poll(self.now)]:
            self.queues[dispatch.rank].append(dispatch)
        self.front.check_integrity()
        trial = self.suspects.quarantine.trial
        if trial is not None:
            assert [dispatch.rid for dispatch in self.queues[trial[1]]] == [trial[0]]
        busy = [rank for rank, queue in self.queues.items() if queue]
        if busy:
            self._work(self.chance.choice(busy))

    def _work(self, rank: int) -> None:
        queue = self.queues[rank]
        company = queue[: self.chance.randint(1, 3)]
        self.batch += 1
        deadly = [each for each in company if each.request.payload.deadly]
        if any(each.request.payload.deadly == "before" for each in company):
            self._die(rank, next(each for each in company if each.request.payload.deadly == "before"))
            return
        self.suspects.batch_started(rank, self.batch, tuple(each.rid for each in company))
        if deadly:
            self._die(rank, deadly[0])
            return
        del queue[: len(company)]
        rids = tuple(each.rid for each in company)
        self.front.report(BatchReport(rank, rids), self.now)
        self.suspects.batch_finished(rank, self.batch, rids)
        for rid in rids:
            self.answers.setdefault(rid, 200)

    def _die(self, rank: int, why: Dispatch | None) -> None:
        if why is not None:
            self.kills[why.rid] = self.kills.get(why.rid, 0) + 1
        del self.queues[rank]
        self.suspects.rank_died(rank, self.now)
        self._join(rank)

    def settle(self, requests: int) -> None:
        for _ in range(60 * requests + 600):
            if not self.front.requests_waiting() and not any(self.queues.values()):
                return
            self.turn()
        raise AssertionError(f"not answered: {[r.rid for r in self.front.requests_waiting()]}")


PLANS = st.lists(
    st.tuples(st.sampled_from([None, None, None, "forward", "before"]), st.sampled_from([None, None, None, 0])),
    min_size=1,
    max_size=40,
)


@given(plan=PLANS, ranks=st.integers(1, 3), seed=st.integers(0, 10**6), pace=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_deadly_requests_kill_twice_and_hurt_nobody(
    plan: list[tuple[str | None, int | None]], ranks: int, seed: int, pace: int
) -> None:
    host = Host(ranks, random.Random(seed))
    for number, (deadly, pinned) in enumerate(plan):
        # Each deadly one is different: what one of them is found guilty of says nothing about the others.
        rid = f"r{number}"
        payload = SimpleNamespace(rid=rid, deadly=deadly, what=rid)
        tokens = array("q", [number % 7] * 20)
        host.front.submit(Request(rid, tokens, host.now, pinned=pinned, payload=payload), host.now)
        for _ in range(pace):
            host.turn()
    host.settle(len(plan))
    expected = {f"r{number}": 500 if deadly else 200 for number, (deadly, _) in enumerate(plan)}
    assert host.answers == expected
    # One that shared another's first death has only its trial's.
    assert all(kills in (1, 2) for kills in host.kills.values())
    assert len(host.kills) == sum(deadly is not None for deadly, _ in plan)
    assert all(host.suspects.deaths.verdict(rank) is None for rank in range(ranks))
    assert host.suspects.quarantine.tracked == 0


@pytest.mark.parametrize("deadly", ["forward", "before"])
def test_the_same_deadly_request_again_and_again_costs_two_deaths_in_all(deadly: str) -> None:
    host = Host(2, random.Random(1))
    for number in range(50):
        host.submit(f"r{number}", deadly)
        host.submit(f"honest{number}")
        if number % 5 == 0:
            host.settle(10)
    host.settle(100)
    # One more each for those that were on other ranks by then.
    assert sum(host.kills.values()) <= 4
    assert all(host.answers[f"r{number}"] == 500 for number in range(50))
    assert all(host.answers[f"honest{number}"] == 200 for number in range(50))


def test_a_client_that_goes_away_does_not_hide_what_it_sent() -> None:
    host = Host(1, random.Random(1))
    deaths = 0
    for number in range(100):
        rid = f"r{number}"
        host.submit(rid, "forward")
        for dispatch in host.front.poll(host.now):
            host.queues[dispatch.rank].append(dispatch)
        if number == 0:
            assert host.suspects.abort(rid, False) == ([], True)
        before = sum(host.kills.values())
        if host.queues[0]:
            host._work(0)
        host.settle(5)
        deaths += sum(host.kills.values()) - before
    # The first is tried although nobody waits for it; its equals are known then.
    assert deaths == 2
    assert host.suspects.deaths.verdict(0) is None


def test_an_aborted_suspect_is_not_tried_and_a_trial_is_not_interrupted() -> None:
    host = Host(1, random.Random(1))
    host.submit("a", "before")
    host.submit("b")
    for dispatch in host.front.poll(host.now):
        host.queues[0].append(dispatch)
    host._die(0, host.queues[0][0])
    assert host.suspects.quarantine.waiting == 2
    assert host.suspects.abort("b", False) == (["b"], True)
    assert host.suspects.quarantine.waiting == 1
    (trial,) = host.suspects.step([0], host.now)
    assert trial.rid == "a"
    # The rank is not told: it would drop the request without a word if it had not begun.
    assert host.suspects.abort("a", False) == ([], False)
    assert host.suspects.quarantine.trial == ("a", 0)


def test_no_request_is_suspected_of_having_stopped_a_rank() -> None:
    host = Host(2, random.Random(1))
    for number in range(6):
        host.submit(f"r{number}")
    for dispatch in host.front.poll(host.now):
        host.queues[dispatch.rank].append(dispatch)
    had = len(host.queues.pop(0))
    assert had > 0
    assert host.suspects.stopped_rank_died(0, host.now) == had
    assert host.suspects.quarantine.tracked == 0
    host._join(0)
    host.settle(6)
    assert set(host.answers.values()) == {200}


def test_a_trial_whose_rank_is_stopped_is_held_again() -> None:
    host = Host(1, random.Random(1))
    host.submit("a", "before")
    for dispatch in host.front.poll(host.now):
        host.queues[0].append(dispatch)
    host._die(0, host.queues[0][0])
    (trial,) = host.suspects.step([0], host.now)
    assert trial.rid == "a"
    del host.queues[0]
    host.suspects.stopped_rank_died(0, host.now)
    assert host.suspects.quarantine.waiting == 1
    host._join(0)
    host.settle(5)
    assert host.answers == {"a": 500}
    assert host.kills == {"a": 2}


def test_the_only_rank_is_shared_between_trials_and_others() -> None:
    quarantine = Quarantine(turn=1.0)
    quarantine.rank_died(0, [f"r{i}" for i in range(100)], (), {}, 1, 0.0)
    now, trials, others = 0.0, 0, 0
    for _ in range(200):
        step = quarantine.step({0: 0}, True, now)
        if step.trial is not None:
            trials += 1
            quarantine.forget(step.trial)
        if step.reserved is None:
            others += 1
        now += 0.1
    assert trials > 60
    assert others > 60


def test_suspects_wait_for_a_rank_with_nothing_to_do_and_then_empty_one() -> None:
    quarantine = Quarantine(patience=5.0)
    quarantine.rank_died(0, ["a"], (), {}, 1, 10.0)
    assert quarantine.step({1: 7, 2: 3}, True, 10.0) == (None, None)
    assert quarantine.next_wakeup(10.0) == 15.0
    assert quarantine.step({1: 7, 2: 3}, True, 15.0) == (2, None)
    assert quarantine.step({1: 7, 2: 0}, True, 16.0) == (2, "a")
    quarantine.forget("a")
    assert quarantine.step({1: 7, 2: 0}, True, 16.1) == (None, None)


@given(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 50)), max_size=200))
def test_what_is_remembered_is_bounded_and_fades(steps: list[tuple[int, float]]) -> None:
    remembered = Remembered(seconds=100.0, most=10)
    now, last = 0.0, dict[int, float]()
    for what, pause in steps:
        now += pause
        known = remembered.knows(what.to_bytes(2, "big"), now)
        if known:
            assert now - last[what] < 100.0
        elif what in last and now - last[what] < 100.0:
            newer = [other for other, at in last.items() if at >= last[what] and other != what]
            assert len(newer) >= 10
        remembered.add(what.to_bytes(2, "big"), now)
        last[what] = now
        assert len(remembered) <= 10


def test_a_rank_that_computes_nothing_ends_the_server_and_one_that_does_does_not() -> None:
    deaths = RankDeaths()
    for number in range(4):
        deaths.died(1, float(number))
        assert (deaths.verdict(1) is None) == (number < 3)
    assert "in a row" in str(deaths.verdict(1))
    # Killed from outside, or by honest requests, with passes in between: ten times is no reason, for ever is.
    deaths = RankDeaths()
    for number in range(40):
        deaths.computed(0)
        deaths.died(0, float(number))
        assert (deaths.verdict(0) is None) == (number < 30)
    # With time in between it is none at all.
    deaths = RankDeaths()
    for number in range(200):
        deaths.computed(0)
        deaths.died(0, 30.0 * number)
        assert deaths.verdict(0) is None


def test_what_a_request_is_guilty_of_does_not_count() -> None:
    deaths = RankDeaths()
    for number in range(100):
        deaths.computed(0)
        first = deaths.died(0, float(number))
        second = deaths.died(0, float(number))
        deaths.explained(second)
        deaths.explained(first)
        assert deaths.verdict(0) is None


def test_the_same_settings_and_tokens_are_the_same_request() -> None:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    from asyncep_sgl.router.fingerprints import fingerprint

    def tokenized(rid: str, tokens: list[int], top_k: int = -1, **fields: Any) -> Any:
        known: dict[str, Any] = {
            "input_text": "",
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": None,
            "return_logprob": False,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "stream": False,
        }
        known.update(fields)
        return TokenizedGenerateReqInput(
            rid=rid,
            input_ids=array("q", tokens),
            sampling_params=SamplingParams(max_new_tokens=0, top_k=top_k),
            **known,
        )

    one = fingerprint(tokenized("a", [1, 2]))
    for same in ({"priority": -1}, {"input_text": "words"}, {"routed_dp_rank": 1}, {"routing_key": "x"}):
        assert fingerprint(tokenized("b", [1, 2], **same)) == one
    others = [
        tokenized("a", [2, 1]),
        tokenized("a", [1, 2], 5),
        tokenized("a", [1, 2], return_logprob=True),
        tokenized("a", [1, 2], token_ids_logprob=[3]),
        tokenized("a", [1, 2], extra_key="salt"),
    ]
    assert len({one, *(fingerprint(other) for other in others)}) == 1 + len(others)
    # Whatever is new in SGLang's request counts, unless it is listed as the sender's.
    assert set(msgspec.structs.asdict(tokenized("a", [1]))) >= {"rid", "time_stats", "priority"}
    assert "a rank both times" in QUARANTINED
