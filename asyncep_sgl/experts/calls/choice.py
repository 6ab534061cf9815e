"""How a rank chooses between weights and tokens: always tokens, by cost, or at random. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from asyncep_sgl.experts.calls.plan import Coming, Prices, due, how_many_to_await, how_many_to_fetch, used
from asyncep_sgl.experts.calls.popularity import Popularity


class LayerPlace(NamedTuple):
    """Where a layer's experts are: here, elsewhere, and on which hosts."""

    experts: int
    own: frozenset[int]
    missing: frozenset[int]
    holders: Mapping[int, frozenset[int]]


class Under(NamedTuple):
    """A part of a fetch: its experts, whether they are there, and else whether they are on their way."""

    experts: Sequence[int]
    there: bool
    coming: bool = True


class Decision(NamedTuple):
    """What becomes of a layer's missing experts that have rows.

    Attributes:
        wait: for each part of the fetch, whether its experts are computed here.
        send: whose rows travel.
        fetch: that are fetched now.
    """

    wait: tuple[bool, ...]
    send: frozenset[int]
    fetch: frozenset[int]


class Routed(NamedTuple):
    """A layer whose tokens have been routed.

    Attributes:
        layer: the decoder layer.
        tokens: of the batch.
        starts: rows of expert e stand between ``starts[e]`` and ``starts[e + 1]``.
        before: seconds that the layer's attention and whatever else precedes its experts took; None if unknown.
    """

    layer: int
    tokens: int
    starts: Sequence[int]
    before: float | None

    def rows(self, expert: int) -> int:
        """Of one expert."""
        return self.starts[expert + 1] - self.starts[expert]

    def rows_of(self, experts: Sequence[int] | frozenset[int]) -> int:
        """Of some experts."""
        return sum(self.rows(expert) for expert in experts)


class Choice(Protocol):
    """One rank's choices, layer by layer."""

    def prefetch(self, layer: int) -> Sequence[int]:
        """Which of the layer's missing experts are fetched now, in the order in which they are to come."""

    def decide(self, routed: Routed, parts: Sequence[Under]) -> Decision:
        """What becomes of the layer's missing experts. ``parts``: of those that `prefetch` named."""

    def pieces(self, routed: Routed, experts: Sequence[int]) -> int:
        """In how many pieces the tokens of some experts are sent to their host."""


def _decision(place: LayerPlace, routed: Routed, parts: Sequence[Under], wait: Sequence[bool]) -> Decision:
    """Everything is sent that is not waited for."""
    here = {expert for part, kept in zip(parts, wait, strict=True) if kept for expert in part.experts}
    send = frozenset(expert for expert in place.missing - here if routed.rows(expert))
    return Decision(tuple(wait), send, frozenset())


@dataclass
class SendAll:
    """Nothing is fetched unless its rows do not come back."""

    layers: Mapping[int, LayerPlace]

    def prefetch(self, layer: int) -> Sequence[int]:
        """See `Choice`."""
        del layer
        return ()

    def decide(self, routed: Routed, parts: Sequence[Under]) -> Decision:
        """See `Choice`."""
        return _decision(self.layers[routed.layer], routed, parts, [False] * len(parts))

    def pieces(self, routed: Routed, experts: Sequence[int]) -> int:
        """See `Choice`."""
        del routed, experts
        return 1


@dataclass
class AtRandom:
    """For tests: whatever is chosen, the answers are the same."""

    layers: Mapping[int, LayerPlace]
    numbers: random.Random

    def prefetch(self, layer: int) -> Sequence[int]:
        """See `Choice`."""
        missing = sorted(self.layers[layer].missing)
        return self.numbers.sample(missing, self.numbers.randint(0, len(missing)))

    def decide(self, routed: Routed, parts: Sequence[Under]) -> Decision:
        """See `Choice`."""
        wait = [(part.there or part.coming) and self.numbers.random() < 0.5 for part in parts]
        found = _decision(self.layers[routed.layer], routed, parts, wait)
        fetch = frozenset(expert for expert in sorted(found.send) if self.numbers.random() < 0.3)
        return Decision(found.wait, found.send - fetch, fetch)

    def pieces(self, routed: Routed, experts: Sequence[int]) -> int:
        """See `Choice`."""
        del routed, experts
        return self.numbers.randint(1, 4)


# A host of which others use this share counts as wholly busy: where all send and wait for each other, none is busy with
# its own work all the time, and yet nobody's core is free.
_AS_BUSY = 0.25
# A fetch moves its price by this share of the difference.
_LEARN = 0.1


@dataclass
class ByCost:
    """Fetches the hottest experts within what earlier layers hide, and sends the rest where that is faster.

    Args:
        layers: in the order they compute.
        busy: answers how busy other hosts are with work of their own, 0 to 1.
        able: answers which hosts may be asked.

    Attributes:
        prices: None until they have been measured; everything is fetched until then.
    """

    layers: Mapping[int, LayerPlace]
    busy: Callable[[], float]
    able: Callable[[], frozenset[int]]
    prices: Prices | None = None
    _popular: dict[int, Popularity] = field(default_factory=dict)
    _tokens: int = 0
    _rows: int = 0
    _before: float = 0.0

    def __post_init__(self) -> None:
        self._popular = {layer: Popularity(place.experts) for layer, place in self.layers.items()}

    def prefetch(self, layer: int) -> Sequence[int]:
        """See `Choice`. The next batch's first layers are taken to be of one like this."""
        place, popular = self.layers[layer], self._popular[layer]
        hottest = popular.hottest(sorted(place.missing))
        if self.prices is None or not self.able():
            return hottest
        rows, own = (
            [self._rows * popular.share(expert) for expert in experts] for experts in (hottest, sorted(place.own))
        )
        count = how_many_to_fetch(
            rows,
            own=self.prices.work(used(own), sum(own)),
            other=self._before,
            tokens=self._tokens,
            prices=self.prices,
            busy=self._busy(),
        )
        if count == len(hottest) and layer == next(iter(self.layers)):
            # One call a batch, of few rows: how busy others are is known from answers alone.
            count -= 1
        return hottest[:count]

    def fetched(self, experts: int, seconds: float) -> None:
        """So many experts took so long to come: what the link costs now."""
        if self.prices is not None:
            self.prices = self.prices.with_fetch(seconds / experts, _LEARN)

    def decide(self, routed: Routed, parts: Sequence[Under]) -> Decision:
        """See `Choice`."""
        place = self.layers[routed.layer]
        self._popular[routed.layer].seen(routed.starts)
        self._tokens, self._rows = routed.tokens, routed.starts[-1]
        if routed.before is not None:
            # As it would have been without the fetches that went on meanwhile, about as many as of this layer.
            fetched = sum(len(part.experts) for part in parts)
            copying = self.prices.copying * self.prices.fetch * fetched if self.prices is not None else 0.0
            self._before = max(routed.before / 2, routed.before - copying)
        if self.prices is None:
            return _decision(place, routed, parts, [True] * len(parts))
        able = self.able()
        asked = frozenset(e for e in place.missing if any(e in place.holders[node] for node in able))
        # What nobody can be asked for is waited for.
        kept = [part.there or (part.coming and not asked.issuperset(part.experts)) for part in parts]
        later = [number for number, part in enumerate(parts) if part.coming and not kept[number]]
        times = due([len(parts[number].experts) for number in later], self.prices.fetch)
        coming = [
            Coming(seconds, *_with_rows(routed, parts[number].experts))
            for seconds, number in zip(times, later, strict=True)
        ]
        under_way = {expert for number in later for expert in parts[number].experts}
        here = {*place.own, *(e for part, keep in zip(parts, kept, strict=True) if keep for e in part.experts)}
        away_experts, away_rows = _with_rows(routed, sorted(place.missing - under_way - here))
        awaited = how_many_to_await(
            coming,
            here=self.prices.work(*_with_rows(routed, sorted(here))),
            away_experts=away_experts,
            away_rows=away_rows,
            tokens=routed.tokens,
            prices=self.prices,
            busy=self._busy(),
        )
        for number in later[:awaited]:
            kept[number] = True
        found = _decision(place, routed, parts, kept)
        return Decision(found.wait, found.send & asked, found.send - asked)

    def pieces(self, routed: Routed, experts: Sequence[int]) -> int:
        """See `Choice`."""
        if self.prices is None:
            return 1
        return self.prices.pieces(*_with_rows(routed, experts), routed.tokens, self._busy())

    def _busy(self) -> float:
        return min(1.0, self.busy() / _AS_BUSY)


def _with_rows(routed: Routed, experts: Sequence[int]) -> tuple[int, int]:
    """How many of ``experts`` have rows, and how many rows."""
    rows = [routed.rows(expert) for expert in experts]
    return sum(map(bool, rows)), sum(rows)
