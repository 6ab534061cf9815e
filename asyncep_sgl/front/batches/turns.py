"""Whose request is next: owners take turns, then each owner's batches; some requests are sent alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Waiter:
    owner: str
    batch: str
    alone: bool
    place: asyncio.Future[None] = field(repr=False)


class Turns:
    """Places for requests under way, of all batches together. For one event loop.

    A place goes to the owner who has the fewest, and among those to whoever was served longest ago; in the same way to
    one of the owner's batches. A request that has to be alone waits until all places are free; before the next such one
    the others get as many places as there are.

    Args:
        places: requests under way at a time.
    """

    def __init__(self, places: int) -> None:
        self._places = self._since_alone = places
        self._held: Counter[tuple[str, ...]] = Counter()
        self._served: dict[tuple[str, ...], int] = {}
        self._turn = 0
        self._under_way = 0
        self._alone = False
        self._waiting: list[_Waiter] = []

    async def enter(self, owner: str, batch: str, *, alone: bool = False) -> None:
        """Returns with a place, to be given back with `leave`."""
        waiter = _Waiter(owner, batch, alone, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._serve()
        try:
            await waiter.place
        except asyncio.CancelledError:
            if waiter.place.cancelled():
                self._serve()
            else:
                self.leave(owner, batch)
            raise

    def leave(self, owner: str, batch: str) -> None:
        """Gives a place back."""
        self._under_way -= 1
        self._alone = False
        for whose in ((owner,), (owner, batch)):
            self._held[whose] -= 1
            if not self._held[whose]:
                del self._held[whose]
        self._serve()

    def _serve(self) -> None:
        # Who no longer waits was cancelled.
        self._waiting = [waiter for waiter in self._waiting if not waiter.place.done()]
        while self._waiting and not self._alone and self._under_way < self._places:
            waiter = self._next()
            if waiter.alone and self._under_way:
                # Nobody else begins meanwhile, so that the places become free.
                return
            self._waiting.remove(waiter)
            self._under_way += 1
            self._alone = waiter.alone
            self._since_alone = 0 if waiter.alone else self._since_alone + 1
            self._turn += 1
            for whose in ((waiter.owner,), (waiter.owner, waiter.batch)):
                self._held[whose] += 1
                self._served[whose] = self._turn
            waiter.place.set_result(None)
        if not self._waiting and not self._under_way:
            # Nobody is left who could have had a turn.
            self._served.clear()

    def _next(self) -> _Waiter:
        together = [waiter for waiter in self._waiting if not waiter.alone]
        among = together if together and self._since_alone < self._places else self._waiting

        def order(waiter: _Waiter) -> tuple[int, ...]:
            owner, batch = (waiter.owner,), (waiter.owner, waiter.batch)
            return self._held[owner], self._served.get(owner, 0), self._held[batch], self._served.get(batch, 0)

        return min(among, key=order)
