"""Weights or tokens: what is fetched before the routing is known, and what is waited for after it. Pure.

Both decisions ask when a layer would be done. A rank computes its own host's rows and those of fetched experts; the
rows of the others travel meanwhile. With the prices of `Prices`, in seconds, a sent call is back after

    call + min(rows, tokens) out / pieces + max((pieces experts expert + rows row) (1 + busy), rows back)

The first products come back once the first piece of the tokens is there; each piece reads the weights again. A busy
host computes a call at half its speed. It also sends as many calls as it is sent, so what a rank saves by sending to
it, it pays by serving it. Between an idle pair sending uses two hosts' cores for one pass. Whatever travels takes a
share of the computing core too, unless a copy engine does the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# What takes so many times the best time is as good; likewise fetching everything, which waits for nobody, where the
# formula knows nothing of waiting.
_AS_GOOD, _ALL_AS_GOOD = 1.03, 1.1
# Into which a layer's tokens for one host may be cut.
_PIECES = range(1, 5)


@dataclass(frozen=True)
class Prices:
    """What things cost on this machine and over this link, in seconds.

    Attributes:
        fetch: the weights of one expert, over the link.
        expert: computing any rows of an expert: its weights are read.
        row: computing one row more.
        out: a token's hidden state, over the link.
        back: a row's product, over the link.
        call: a call of one row, beyond the above.
        copying: share of a core that is taken by what comes or goes while the link is busy, 0 and up.
    """

    fetch: float
    expert: float
    row: float
    out: float
    back: float
    call: float
    copying: float = 0.0

    def with_fetch(self, seconds: float, weight: float) -> Prices:
        """Once an expert has taken ``seconds`` to come. What else travels over the link is dearer by as much.

        What met a moment's trouble counts as twice as slow, however slow it was.
        """
        seen = min(2 * self.fetch, max(self.fetch / 2, seconds))
        factor = 1 + weight * (seen / self.fetch - 1)
        return replace(self, fetch=self.fetch * factor, out=self.out * factor, back=self.back * factor)

    def work(self, experts: float, rows: float) -> float:
        """Of computing ``rows`` of so many ``experts``."""
        return experts * self.expert + rows * self.row

    def sent(self, experts: float, rows: float, tokens: float, busy: float) -> float:
        """Until rows are back that ``tokens`` have at so many ``experts`` of a host that is ``busy``, 0 to 1."""
        return min(self._sent_in(pieces, experts, rows, tokens, busy) for pieces in _PIECES) if rows > 0 else 0.0

    def pieces(self, experts: float, rows: float, tokens: float, busy: float) -> int:
        """In how many pieces they are best sent."""
        return min(_PIECES, key=lambda pieces: self._sent_in(pieces, experts, rows, tokens, busy))

    def _sent_in(self, pieces: int, experts: float, rows: float, tokens: float, busy: float) -> float:
        out = min(rows, tokens) * self.out / pieces
        return self.call + out + max(self.work(pieces * experts, rows) * (1 + busy), rows * self.back)


@dataclass(frozen=True)
class Coming:
    """Experts that are fetched together.

    Attributes:
        due: seconds until they are there.
        experts: of them that have rows.
        rows: of these.
    """

    due: float
    experts: int
    rows: float


def seconds_by_fetched(
    rows: Sequence[float], *, own: float, other: float, tokens: float, prices: Prices, busy: float
) -> list[float]:
    """How long a layer takes if the first 0, 1, 2 … of its missing experts are fetched while earlier layers compute.

    The layer is done once its own rows and those of fetched experts are computed and the sent ones are back. It takes
    no less than the link is busy with it, in the busier direction.

    Args:
        rows: expected of each missing expert, in the order in which they would be fetched.
        own: seconds of the rows that this host computes anyway.
        other: seconds of the layer's attention and whatever else precedes its experts, while nothing is fetched.
        tokens: of the batch.
        prices: of work and of what travels.
        busy: of the hosts that would be asked.
    """
    found = []
    fetched, fetched_used = 0.0, 0.0
    left, left_used = sum(rows), used(rows)
    for count, moved in enumerate([0.0, *rows]):
        fetched, fetched_used = fetched + moved, fetched_used + used([moved])
        left, left_used = (left - moved, left_used - used([moved])) if count < len(rows) else (0.0, 0.0)
        serving = busy * prices.work(left_used, left)
        out, back = min(left, tokens) * prices.out, left * prices.back
        # A busy host sends as much as it is sent.
        copying = prices.copying * (out + back) * (1 + busy)
        here = own + prices.work(fetched_used, fetched) + serving + copying
        link = count * prices.fetch + back + busy * out
        # Weights come while the rank attends, and slow that; rows travel while it computes experts or waits.
        before = other + prices.copying * count * prices.fetch
        found.append(max(before + max(here, prices.sent(left_used, left, tokens, busy)), link))
    return found


def used(rows: Iterable[float]) -> float:
    """How many experts are computed at all, of those with so many expected rows each."""
    return sum(min(1.0, each) for each in rows)


def how_many_to_fetch(
    rows: Sequence[float], *, own: float, other: float, tokens: float, prices: Prices, busy: float
) -> int:
    """How many of a layer's missing experts, the hottest first, are fetched; see `seconds_by_fetched`.

    All where that is about as good as anything, since a rank that has all waits for nobody. Else as few as are as good:
    which experts a batch will choose is a guess.
    """
    found = seconds_by_fetched(rows, own=own, other=other, tokens=tokens, prices=prices, busy=busy)
    best = min(found)
    if found[-1] <= best * _ALL_AS_GOOD:
        return len(rows)
    return next(count for count, seconds in enumerate(found) if seconds <= best * _AS_GOOD)


def how_many_to_await(
    coming: Sequence[Coming],
    *,
    here: float,
    away_experts: int,
    away_rows: float,
    tokens: float,
    prices: Prices,
    busy: float,
) -> int:
    """For how many of the experts on their way a layer waits, in their order; the rows of the others are sent.

    Args:
        coming: what is under way.
        here: seconds of the rows that can be computed now.
        away_experts, away_rows: what is sent in any case.
        tokens: of the batch.
        busy: of the hosts that would be asked.
    """
    last = coming[-1].due if coming else 0.0
    clock, found = here, []
    for count, part in enumerate([None, *coming]):
        if part is not None:
            clock = max(clock, part.due) + prices.work(part.experts, part.rows)
        rest = coming[count:]
        experts = away_experts + sum(one.experts for one in rest)
        rows = away_rows + sum(one.rows for one in rest)
        sent = prices.sent(experts, rows, tokens, busy)
        if sent and rest:
            # What is not waited for comes all the same, beside the products.
            sent += min(rows * prices.back, last)
        found.append(max(clock, sent))
    best = min(found)
    return max(count for count, seconds in enumerate(found) if seconds <= best * _AS_GOOD)


def due(parts: Sequence[int], fetch: float) -> list[float]:
    """Seconds until each of some parts is there that come one after the other.

    Args:
        parts: experts of each.
        fetch: seconds of one expert.
    """
    return [experts * fetch for experts in itertools.accumulate(parts)]
