"""bench/calls.py without servers: what it concludes from a record, and which options it refuses."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    monkeypatch.syspath_prepend(BENCH)
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCH)):
            del sys.modules[name]


def record() -> dict[str, Any]:
    """Four sides; AsyncEP answers a prompt in 1.6 s, auto in 0.2, TP in 0.25, PP in 0.1."""
    alone = {"AsyncEP, one-sided": 1.6, "auto": 0.2, "TP-2": 0.25, "PP-2": 0.1, "EP-2": 0.16}
    speeds = {"AsyncEP, one-sided": 100.0, "auto": 98.0, "TP-2": 60.0, "PP-2": 120.0, "EP-2": 20.0}

    def rounds(side: str) -> list[dict[str, float]]:
        return [{"tokens_per_s": speeds[side] * factor, "requests_per_s": speeds[side] / 10} for factor in (1, 1, 9)]

    return {
        "links": {1.0: "760mbit"},
        "isa": "best",
        "core_peak_flops": 2e11,
        "lone": {"1": {name: {"256": [seconds] * 3, "4096": [seconds]} for name, seconds in alone.items()}},
        "wide": {},
        "loads": {load: {name: rounds(name) for name in speeds} for load in ("mix", "news")},
        "arrivals": {
            name: {"0.5": {"rate": 5.0, "seconds": [number * scale for number in range(100)]}}
            for name, scale in (("auto", 2.0), ("TP-2", 4.0), ("PP-2", 0.5), ("EP-2", 9.0))
        },
        "one host": {
            "seconds": {
                "two ranks, the idle one helps": {"512": [0.1, 0.2, 0.3]},
                "two ranks, the idle one rests": {"512": [0.4]},
                "stock, two threads": {"512": [0.1]},
            },
            "answers": 3,
            "different": 0,
        },
        "bits": {"answers": 12, "different": 1},
        "failed": {},
    }


def test_claims_are_of_medians_and_of_sides_that_keep_up(bench: Callable[[str], Any]) -> None:
    found = {claim.name: claim for claim in bench("calls_tables").claims_of(record())}
    values = {name: round(claim.value, 3) for name, claim in found.items()}
    where = "lone, link x1, 256 to 1,024 tokens"
    assert values == {
        f"{where}: AsyncEP's time over auto's, least": 8.0,
        f"{where}: auto's time over the better of PP-2, TP-2, most": 2.0,
        "lone, link x1: auto's time over EP-2's, any length, most": 1.25,
        "tokens/s of auto over AsyncEP's, mix": 0.98,
        "tokens/s of auto over the best of TP-2, EP-2, news": 1.633,
        "tokens/s of auto over PP's, news": 0.817,
        "p50 of auto over TP-2's at 50%": 0.5,
        "p99 of auto over TP-2's at 50%": 0.5,
        "p50 of auto over PP-2's at 50%": 4.0,
        "p99 of auto over PP-2's at 50%": 4.0,
        "one host, a prompt of 512 tokens: two ranks, the idle one helps, over two ranks, the idle one rests": 0.5,
        "one host, a prompt of 512 tokens: two ranks, the idle one helps, over stock, two threads": 2.0,
        "one host, answers with and without help that differ in a bit, of 3": 0,
        "answers that differ in a bit, of 12": 1,
    }  # EP-2 serves 2 requests a second, and 5 arrive
    assert not found["answers that differ in a bit, of 12"].holds
    assert not found[f"{where}: auto's time over the better of PP-2, TP-2, most"].holds
    assert found["p50 of auto over TP-2's at 50%"].holds


def test_what_was_not_run_is_not_claimed_and_not_drawn(bench: Callable[[str], Any], tmp_path: Path) -> None:
    tables = bench("calls_tables")
    empty = {**record(), "lone": {}, "loads": {}, "arrivals": {}, "one host": {}, "bits": {}}
    assert tables.claims_of(empty) == []
    tables.plot(empty, tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
    tables.plot({**record(), "wide": record()["lone"]}, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "arrivals"], "--parts arrivals: their rate"),
        (["--parts", "loads", "arrivals", "--sides", "auto"], "--parts arrivals: their rate"),
        (["--factors", "0"], "--factors must be above 0"),
        (["--sides", "nobody"], "--sides: invalid choice"),
    ],
)
def test_what_would_measure_nothing_is_refused(
    bench: Callable[[str], Any], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench("calls").options_of(arguments)
    assert words in capsys.readouterr().err
