"""Trace readers on small files of the published formats, and the generators' promises."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from asyncep.sim.traces import read_azure, read_mooncake, read_trace
from asyncep.sim.workloads import conversations, few_shot_mix, long_inputs
from asyncep_router.errors import TraceError

if TYPE_CHECKING:
    from pathlib import Path


def test_mooncake_prompts_share_what_their_hash_ids_share(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 2500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 9]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    first, second = read_mooncake(path)
    assert (first.arrival, second.arrival) == (0, 2.5)
    assert (len(first.token_ids), len(second.token_ids)) == (1300, 1100)
    assert first.token_ids[:1024] == second.token_ids[:1024]
    assert first.token_ids[1024:1100] != second.token_ids[1024:1100]
    assert read_mooncake(path, limit=1, max_tokens=600)[0].token_ids == first.token_ids[:600]


def test_a_scaled_trace_shares_the_same_part(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 9, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 9]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    first, second = read_trace(path, scale=1 / 16)
    assert (len(first.token_ids), len(second.token_ids)) == (81, 68)
    assert first.token_ids[:64] == second.token_ids[:64]
    assert first.token_ids[64:68] != second.token_ids[64:68]
    azure = tmp_path / "trace.csv"
    azure.write_text("TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9799600,480\n")
    assert len(read_trace(azure, scale=0.1)[0].token_ids) == 48


def test_sessions_are_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": turn, "input_length": 512 * (turn + 2), "hash_ids": [0, *range(100 * s, 100 * s + turn + 1)]}
        for s in range(1, 301)
        for turn in range(3)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    kept = read_trace(path, scale=1 / 16, keep=0.2)
    turns: dict[bytes, int] = {}
    for prompt in kept:
        session = prompt.token_ids[32:64].tobytes()
        turns[session] = turns.get(session, 0) + 1
    assert set(turns.values()) == {3}
    assert 30 <= len(turns) <= 90
    assert read_trace(path, scale=1 / 16, keep=0.2) == kept


def test_azure_prompts_have_the_right_lengths_and_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,480,10\n2023-11-16 18:17:04.4799600,318,8\n"
    )
    first, second = read_azure(path)
    assert (first.arrival, second.arrival) == (0.0, pytest.approx(0.5))
    assert (len(first.token_ids), len(second.token_ids)) == (480, 318)
    assert first.token_ids[:16] != second.token_ids[:16]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text('{"timestamp": 0, "input_length": 600, "hash_ids": [1]}')
    with pytest.raises(TraceError, match="bad:1: 1 blocks cannot hold 600"):
        read_mooncake(path)
    path.write_text("no json")
    with pytest.raises(TraceError, match="bad:1"):
        read_mooncake(path)
    path.write_text("TIMESTAMP,ContextTokens\nyesterday,5\n")
    with pytest.raises(TraceError, match="bad:2"):
        read_azure(path)
    with pytest.raises(TraceError, match="neither"):
        read_trace(path)


def test_generators_repeat_themselves_and_keep_their_promises() -> None:
    for make in (
        lambda seed: few_shot_mix(50, seed=seed, rate=10),
        lambda seed: long_inputs(3, seed=seed),
        lambda seed: conversations(5, seed=seed),
    ):
        assert make(1) == make(1)
        assert make(1) != make(2)
        arrivals = [prompt.arrival for prompt in make(1)]
        assert arrivals == sorted(arrivals)
    by_group: dict[int, bytes] = {}
    for prompt in few_shot_mix(200, seed=0, tasks=5):
        head = prompt.token_ids[: prompt.shared].tobytes()
        assert by_group.setdefault(prompt.group, head) == head
    assert len(by_group) == 5
