"""A language model of a few lines, exact and free, in the place of a server: for tests of what is built around one."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncep.client.errors import RejectedError
from asyncep.client.plan import TokenCost
from asyncep.client.probes import Probe, Reading
from asyncep.client.server_facts import ServerFacts

VOCABULARY = 256
REFUSED = ord("!")  # a prompt with this token is refused, and spoils its batch


def next_logs(ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities of the next token, [VOCABULARY]: a fixed function of all tokens before it."""
    seed = zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())
    logits = np.random.default_rng(seed).normal(size=VOCABULARY)
    return np.asarray(logits - np.log(np.exp(logits).sum()))


def log_likelihood(prompt: Sequence[int], label: Sequence[int]) -> float:
    """Of a label after a prompt, one token after another."""
    return float(sum(next_logs([*prompt, *label[:i]])[token] for i, token in enumerate(label)))


class ByteTokens:
    """UTF-8 as token ids."""

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


@dataclass
class ToyServer:
    """Answers probes by the toy model and keeps books.

    `asked`: (rank, prompts) of each call. `turns`: how often it lets others go first before it answers.
    """

    asked: list[tuple[int | None, list[tuple[int, ...]]]] = field(default_factory=list)
    turns: int = 1
    in_flight: int = 0
    most_in_flight: int = 0

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        self.asked.append((rank, [tuple(probe.ids) for probe in probes]))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        for _ in range(self.turns):
            await asyncio.sleep(0)
        self.in_flight -= 1
        if any(REFUSED in probe.ids for probe in probes):
            raise RejectedError("refused")
        return [_reading(probe) for probe in probes]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """Every prompt asked about, repetitions and refused ones too."""
        return [prompt for _, prompts in self.asked for prompt in prompts]


def _reading(probe: Probe) -> Reading:
    logs = next_logs(probe.ids)
    start = probe.read_from
    own = () if start is None else [next_logs(probe.ids[:i])[probe.ids[i]] for i in range(start, len(probe.ids))]
    return Reading([float(logs[token]) for token in probe.next_ids], [float(log) for log in own], 0)


def toy_facts(ranks: int = 2, *, most_tokens: int | None = 4000, threshold: int = 200, page: int = 4) -> ServerFacts:
    """What such a server would say of itself."""
    return ServerFacts(ranks, ranks > 1, page, most_tokens, None, "toy", TokenCost(), threshold)
