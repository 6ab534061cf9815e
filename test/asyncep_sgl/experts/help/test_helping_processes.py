"""Help among processes: whoever is killed or stopped in the middle of a block, the bits are those of one rank alone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import help_process
import pytest
import torch

from asyncep_kernels.attention import cpu as attention
from asyncep_kernels.attention.batch import Batch
from asyncep_kernels.attention.plan import Plan, plan
from asyncep_kernels.help import offer
from asyncep_kernels.help.board import board_bytes
from asyncep_kernels.moe import cpu, cpu_native
from asyncep_sgl.experts.help import helper as helper_module
from asyncep_sgl.experts.help import offering
from asyncep_sgl.experts.help.offering import Offering, join_board
from asyncep_sgl.process.segment import OwnedSegment

pytestmark = pytest.mark.skipif(cpu_native.library() is None, reason="no C kernels for this CPU")

SHAPE = EXPERTS, WIDTH, INTER = 12, 256, 512
TRIES = 60


class Stand:
    """A rank that offers, and others that help."""

    def __init__(self) -> None:
        self._page = OwnedSegment("help", board_bytes(2))
        self._helpers: list[subprocess.Popen[str]] = []
        self.table = help_process.table(*SHAPE)
        generator = torch.Generator().manual_seed(1)
        self.hidden = torch.randn(700, WIDTH, generator=generator).bfloat16()
        self.ids = torch.randint(0, EXPERTS, (700, 4), generator=generator)
        self.weights = torch.rand(700, 4, generator=generator)
        self.alone = cpu.moe(self.hidden, self.ids, self.weights, self.table)
        self.offering = Offering(join_board(self._page.path, 2, 0))

    def start(self, threads: int = 1) -> subprocess.Popen[str]:
        """Another rank that helps, in the place of the one before."""
        script = Path(help_process.__file__)
        words = [sys.executable, str(script), self._page.path, "2", "1", str(threads), *map(str, SHAPE)]
        helper = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._helpers.append(helper)
        assert helper.stdout is not None
        assert helper.stdout.readline() == "helps\n"
        return helper

    def ask(self) -> int:
        """One layer, with the right bits; blocks that the helper computed."""
        before = self.offering.counts.helped
        found = self.offering.moe(0, self.hidden, self.ids, self.weights, self.table)
        # Nobody helps while the other rank starts anew.
        assert found is None or torch.equal(found, self.alone)
        return self.offering.counts.helped - before

    def attention(self) -> tuple[torch.Tensor, torch.Tensor, Plan, torch.Tensor]:
        """A prompt's queries, its cached keys (which are its values too), the plan, and what comes of them."""
        generator = torch.Generator().manual_seed(2)
        q = torch.randn(900, 4, 64, generator=generator).bfloat16()
        cache = torch.randn(1100, 2, 64, generator=generator).bfloat16()
        made = plan(Batch([900], [100], [torch.randperm(1100, generator=generator)[:1000]]))
        return q, cache, made, attention.attention(q, cache, cache, made, scale=0.125)

    def attend(self, q: torch.Tensor, cache: torch.Tensor, made: Plan) -> torch.Tensor | None:
        """The same, offered; None if it is not."""
        out = torch.empty_like(q)
        return out if self.offering.attention(q, cache, cache, made, scale=0.125, out=out) else None

    def helped(self) -> None:
        """Asks until the helper has computed something."""
        deadline = time.monotonic() + 30
        while not self.ask():
            assert time.monotonic() < deadline

    def close(self) -> None:
        for helper in self._helpers:
            helper.kill()
            helper.communicate()
        self._page.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A helper is waited for, however busy the machine is."""
    monkeypatch.setattr(offer, "LEAST_PATIENCE", 60.0)


@pytest.fixture
def stand() -> Iterator[Stand]:
    made = Stand()
    yield made
    made.close()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("threads", [1, 2])
def test_another_process_helps_and_leaves(stand: Stand, threads: int) -> None:
    helper = stand.start(threads)
    stand.helped()
    helper.communicate("")
    assert helper.returncode == 0
    assert not stand.offering.board.others_idle()
    assert stand.offering.counts.left == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda how: how.name)
def test_a_helper_goes_in_the_middle_of_a_block(stand: Stand, how: signal.Signals) -> None:
    """The rank goes on with the same bits, in another memory; the one that comes back helps again."""
    numbers = random.Random(3)
    helper = stand.start()
    for _ in range(TRIES):
        stand.helped()
        left = stand.offering.counts.left
        ending = threading.Timer(numbers.uniform(0, 0.01), helper.send_signal, (how,))
        ending.start()
        while ending.is_alive():
            stand.ask()
        for _ in range(5):
            stand.ask()
        if how is signal.SIGSTOP:
            helper.send_signal(signal.SIGCONT)
        else:
            helper.wait()
            helper = stand.start()
        if stand.offering.counts.left > left:
            break
    else:
        pytest.fail(f"in {TRIES} tries nobody went in the middle of a block")
    stand.helped()


@pytest.mark.usefixtures("patient")
def test_a_large_batch_is_offered_in_pieces(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.start()
    stand.helped()
    whole = stand.offering.counts.blocks
    stand.ask()
    whole = stand.offering.counts.blocks - whole
    monkeypatch.setattr(offering, "PIECE_TOKENS", 96)
    stand.helped()
    cut = stand.offering.counts.blocks
    stand.ask()
    assert stand.offering.counts.blocks - cut > whole


def test_without_memory_for_an_offer_a_rank_computes_alone(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.start()

    def none_left(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(offering, "OwnedSegment", none_left)
    assert stand.offering.moe(0, stand.hidden, stand.ids, stand.weights, stand.table) is None
    monkeypatch.undo()
    # Once is enough: it would be said again with each layer.
    assert stand.offering.moe(0, stand.hidden, stand.ids, stand.weights, stand.table) is None


def test_memory_of_another_process_is_not_mapped() -> None:
    """A rank is gone and its number is another process' now."""
    foreign = OwnedSegment("keys", 4096)
    assert helper_module._mapped(foreign.path, 0) is None
    own = OwnedSegment(f"{helper_module.SEGMENT}-0", 4096)
    assert helper_module._mapped(own.path, 1) is None
    mapped = helper_module._mapped(own.path, 0)
    assert mapped is not None
    assert len(mapped) == 4096


@pytest.mark.usefixtures("patient")
def test_what_is_too_large_is_computed_alone_or_in_smaller_pieces(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offering, "MOST_BYTES", 1 << 20)
    stand.start()
    stand.helped()
    q, cache, made, _ = stand.attention()
    assert stand.attend(q, cache, made) is None


@pytest.mark.usefixtures("patient")
def test_attention_is_helped_too(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    stand.start()
    q, cache, made, alone = stand.attention()
    deadline = time.monotonic() + 30
    while not stand.offering.counts.helped:
        assert time.monotonic() < deadline
        found = stand.attend(q, cache, made)
        assert found is not None
        assert torch.equal(found, alone)
    # One token of it is not worth a ring, nor are a few new ones after many.
    few = Batch([19], [3000], [torch.zeros(3019, dtype=torch.int64)])
    assert stand.attend(q[:19], cache, plan(few)) is None
    monkeypatch.setattr(offering, "LEAST_FLOPS_A_BYTE", 30)
    assert stand.attend(q[:19], cache, plan(few)) is not None
    assert stand.attend(q[:1], cache, plan(Batch([1], [0], [torch.tensor([3])]))) is None
