"""The one question everything here is made of: a prefill pass and the log-probabilities read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Probe:
    """One prefill pass.

    Attributes:
        ids: the prompt's token ids.
        next_ids: token ids whose log-probability as the next token is asked for.
        read_from: position in `ids` from which on the prompt's own tokens are scored too, each given those before it;
            None for none. At least 1: the first token has nothing before it.
    """

    ids: Sequence[int]
    next_ids: Sequence[int]
    read_from: int | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """A probe's answer.

    Attributes:
        next: log-probability of each of the probe's `next_ids`, in nats.
        own: log-probability of each token of ``ids[read_from:]``, in nats.
        cached: tokens of the prompt that were found in the prefix cache.
    """

    next: Sequence[float]
    own: Sequence[float]
    cached: int


class Answerer(Protocol):
    """Answers probes: a server, or in tests and benches something that costs nothing."""

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """One reading a probe, in order.

        Args:
            rank: the rank to compute them on; None leaves it to the server.

        Raises:
            RejectedError: the server refuses them; one bad probe spoils all that are asked with it.
            ServerError: the server failed.
        """
        ...
