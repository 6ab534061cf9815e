"""Experts of one layer on their way into one slot, in waves, whatever happens to the hosts they come from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.gather import Counters
from asyncep_sgl.experts.gather.pipeline import Gathered
from asyncep_sgl.experts.sources.arrivals import Arrivals, Arrived, Round, Wrong
from asyncep_sgl.experts.sources.remote import Copy, PeerLostError, Read

logger = logging.getLogger(__name__)

# A read that takes this long makes its reader ask whether the host is still there.
_SUSPICIOUS_SECONDS = 2.0
# What came wrong is asked for again after 0.2 s, 0.4 s …; a fifth time ends the rank.
_MOST_WRONG = 5
_WRONG_SECONDS = 0.1


class Peers(Protocol):
    """The hosts that experts come from: `peer_source.PeerSource`."""

    counters: Counters
    arrivals: Arrivals

    def choose(self, layer: int, experts: Sequence[int]) -> dict[int, frozenset[int]] | None:
        """Which host gives which expert; None while one is nowhere to be had."""

    def copies(self, layer: int, slot: int, chosen: Mapping[int, frozenset[int]]) -> dict[int, list[Copy]]:
        """What to read of each host."""

    def read(self, node: int, copies: list[Copy]) -> Read:
        """Asks a host for bytes. Raises `PeerLostError`."""

    def wrong(self, layer: int, slot: int, chosen: Mapping[int, frozenset[int]]) -> Wrong:
        """What did not come as its owner wrote it."""

    def lose(self, node: int, connection: int | None = None) -> None:
        """A read from a host broke."""

    def gone_or_new(self, nodes: set[int]) -> set[int]:
        """Hosts that should not be waited for as they are."""

    def refresh(self) -> object:
        """Connects to hosts that are new."""

    def wait_for_peers(self) -> None:
        """Returns once every expert can be read from somewhere."""


@dataclass
class Wave:
    """Some experts that are asked for together and can be used together."""

    source: Peers
    layer: int
    slot: int
    experts: Sequence[int]
    _round: Round | None = None
    _undisturbed: bool = True
    _wrong_times: int = 0

    def __post_init__(self) -> None:
        self._ask()

    def wait(self) -> Gathered:
        """See `pipeline.Fetch`. Waits as long as it takes: hosts come back, and ranks are ended from outside.

        Raises:
            GatherError: what comes is, again and again, not what its owner says it wrote.
        """
        while True:
            if self._round is None:
                self._undisturbed = False
                self.source.wait_for_peers()
                self._ask()
                continue
            try:
                arrived = self._round.wait(_SUSPICIOUS_SECONDS)
            except TimeoutError:
                self._undisturbed = False
                if gone := self.source.gone_or_new(set(self._round.reads)):
                    for node in gone:
                        self.source.lose(node)
                    self._ask_again()
                continue
            if not arrived.broken and not arrived.wrong:
                return Gathered(arrived.seconds, exact=self._undisturbed)
            self._disturbed(arrived)
            if arrived.wrong:
                if self._wrong_times == _MOST_WRONG:
                    raise GatherError(f"layer {self.layer} came wrong {self._wrong_times} times: {arrived.wrong[0]}")
                # Whoever writes there may need a moment; or its owner has started anew, which asking again finds out.
                time.sleep(_WRONG_SECONDS * 2**self._wrong_times)
            self._ask_again()

    def there(self) -> bool:
        """Whether all is there and checked."""
        arrived = self._ended()
        return arrived is not None and not arrived.broken and not arrived.wrong

    def coming(self) -> bool:
        """Whether it is on its way, as far as is known."""
        return self._round is not None and not self._round.ended.done()

    def over(self) -> bool:
        """See `pipeline.Fetch`."""
        return self._round is None or self._round.over()

    def cancel(self) -> None:
        """See `pipeline.Fetch`."""
        if self._round is None:
            return
        self._round.stop()
        # Nobody has waited for it: what went wrong is not known yet.
        if (arrived := self._ended()) is not None and (arrived.broken or arrived.wrong):
            self._disturbed(arrived)
        self._round = None

    def _ended(self) -> Arrived | None:
        """How it ended; None if it has not, or was stopped."""
        if self._round is None or not self._round.ended.done() or self._round.ended.exception() is not None:
            return None
        return self._round.ended.result()

    def _disturbed(self, arrived: Arrived) -> None:
        self._undisturbed = False
        for node, connection in arrived.broken.items():
            self.source.lose(node, connection)
        if arrived.wrong:
            self._wrong_times += 1
            self.source.counters.digest_failures += len(arrived.wrong)
            logger.error("layer %d came wrong (%s); it is gathered again", self.layer, arrived.wrong[0])

    def _ask_again(self) -> None:
        # Other hosts' reads may still write into the slot that is about to be asked for again.
        if self._round is not None:
            self._round.stop()
        self.source.refresh()
        self._ask()

    def _ask(self) -> None:
        self._round = None
        chosen = self.source.choose(self.layer, self.experts)
        if chosen is None:
            return
        reads: dict[int, Read] = {}
        try:
            for node, copies in self.source.copies(self.layer, self.slot, chosen).items():
                reads[node] = self.source.read(node, copies)
        except PeerLostError:
            self.source.lose(node)
            for read in reads.values():
                read.abandon()
            return
        # Of the source's method, not of this object: a fetch and its round should not keep each other alive.
        self._round = self.source.arrivals.watch(reads, partial(self.source.wrong, self.layer, self.slot, chosen))


@dataclass(frozen=True)
class LayerFetch:
    """Waves of one layer, in the order in which they come; see `pipeline.Fetch`. None where nothing was asked for."""

    parts: Sequence[Wave]

    def wait(self) -> Gathered:
        """See `pipeline.Fetch`."""
        found = [wave.wait() for wave in self.parts]
        return Gathered(sum(one.seconds for one in found), exact=all(one.exact for one in found))

    def over(self) -> bool:
        """See `pipeline.Fetch`."""
        return all(wave.over() for wave in self.parts)

    def cancel(self) -> None:
        """See `pipeline.Fetch`."""
        for wave in self.parts:
            wave.cancel()
