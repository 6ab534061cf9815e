"""The order of gathers: which layer is fetched into which slot, and when a layer may compute. Pure, time injected.

Layers are numbered through without end: step s is layer ``s mod M`` of batch ``s div M``. Step s always uses slot
``s mod depth``. A slot goes round in this circle, and never leaves it:

    empty ──fetch──▶ fetching(s) ──done──▶ ready(s) ──wait──▶ in use(s) ──release──▶ empty

At most ``depth`` steps from the current one on are under way, so the next batch's first layers come in while this
batch's last ones compute, and an idle rank has them ready and asks for nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Gathered(NamedTuple):
    """How long a transfer took: exactly, or (done before anybody looked) at most."""

    seconds: float
    exact: bool


class Timing(Protocol):
    """A `Gathered`, or on a device something that becomes one once the device has got there."""

    @property
    def seconds(self) -> float: ...

    @property
    def exact(self) -> bool: ...


class Fetch(Protocol):
    """One layer's experts on their way into a slot."""

    def wait(self) -> Timing:
        """Returns once the slot holds the layer, complete and checked; on a device, for what is queued from now on.

        Raises:
            GatherError: it will not come. The slot's contents are undefined, and nothing writes to it any more.
        """

    def over(self) -> bool:
        """Whether `cancel` would return at once."""

    def cancel(self) -> None:
        """Returns once nothing writes to the slot any more, or whatever is started next is queued behind it."""


@dataclass
class _Slot:
    step: int = -1
    fetch: Fetch | None = None
    whole: bool = False
    """The fetch has been waited for, all of it."""
    in_use: bool = False
    stale: Fetch | None = None
    """Of an abandoned step: nobody wants it any more, and until it has ended the slot cannot be used."""


@dataclass(frozen=True)
class LayerTrace:
    """What one layer of one batch met.

    Attributes:
        layer: the decoder layer.
        exposed: seconds that compute stood still for the layer's experts.
        window: seconds from the beginning of this layer's wait to that of the next one's, without those that it stood
            still: what a gather can hide behind. None for a batch's last layer, whose window has the time between
            batches in it.
        gather: how long the layer's transfer took; None if the slot had been waited for before, or in part only.
    """

    layer: int
    exposed: float
    window: float | None
    gather: Timing | None


@dataclass
class _Waited:
    """A layer whose window is open: when it began to wait, how long it has stood still."""

    layer: int
    began: float
    exposed: float = 0.0
    gather: Timing | None = None


@dataclass
class GatherPipeline:
    """Keeps ``depth`` slots filled ahead of the computation.

    Order of calls for each batch: `begin`, then `wait` and `release` for each of ``layers`` in order. Who computes with
    what is there already calls `take` and `waited` in the place of `wait`. A batch may be given up at any point; the
    next `begin` starts over.

    Attributes:
        layers: the layers that gather anything, in the order they compute.
        depth: slots, at least 1. With 1 nothing overlaps.
        start: begins to fetch a layer into a slot.
        clock: seconds.
        batches: batches begun so far.
    """

    layers: Sequence[int]
    depth: int
    start: Callable[[int, int], Fetch]
    clock: Callable[[], float]
    batches: int = 0
    _step: int = 0
    _slots: list[_Slot] = field(default_factory=list)
    _trace: list[LayerTrace] = field(default_factory=list)
    _waited: _Waited | None = None

    def __post_init__(self) -> None:
        if not self.layers or self.depth < 1:
            raise ValueError(f"a pipeline of {len(self.layers)} layers and {self.depth} slots")
        self._slots = [_Slot() for _ in range(self.depth)]

    def begin(self) -> None:
        """A batch is about to compute. Fetches what is not there yet; moves nothing when all is."""
        self._trace.clear()
        self._waited = None
        self.batches += 1
        for slot in self._slots:
            # In use by a batch that was given up in the middle.
            slot.in_use = False
        self._step = -(-self._step // len(self.layers)) * len(self.layers)
        self._fill()

    def wait(self, layer: int) -> int:
        """Blocks until ``layer`` may compute; returns the slot its gathered experts lie in, valid until `release`.

        Raises:
            ValueError: it is not this layer's turn.
            GatherError: the experts will not come. The batch may try again or be given up.
        """
        slot = self._turn(layer)
        began = self.clock()
        self._empty(slot)
        if slot.step != self._step:
            self._fetch(slot, self._step)
        gather = None
        if slot.fetch is not None and not slot.whole:
            fetch = slot.fetch
            try:
                gather = fetch.wait()
            except BaseException:
                # Whatever came is not to be trusted: the next wait fetches anew.
                slot.step, slot.fetch, slot.stale = -1, None, fetch
                raise
            slot.whole = True
        slot.in_use = True
        self._waited = _Waited(layer, began, self.clock() - began, gather)
        return self._step % self.depth

    def take(self, layer: int, *, patient: bool) -> tuple[int, Fetch | None]:
        """Begins ``layer`` without waiting for its experts.

        Args:
            patient: wait where an abandoned fetch still writes into the slot, and fetch the layer now if it was not
                fetched ahead; nothing comes into the slot otherwise.

        Returns:
            Its slot until `release`, and what has come or is coming into it.

        Raises:
            ValueError: it is not this layer's turn.
        """
        slot = self._turn(layer)
        if patient:
            self._empty(slot)
            if slot.step != self._step:
                self._fetch(slot, self._step)
        slot.in_use = True
        self._waited = _Waited(layer, self.clock())
        return self._step % self.depth, slot.fetch

    def waited(self, seconds: float, gather: Timing | None = None) -> None:
        """The layer that was taken has stood still for ``seconds``; ``gather`` if all of its fetch was waited for."""
        if self._waited is not None:
            self._waited.exposed += seconds
            self._waited.gather = gather or self._waited.gather
            self._slots[self._step % self.depth].whole |= gather is not None

    def release(self, layer: int) -> None:
        """``layer`` has computed: its slot takes the next layer.

        Raises:
            ValueError: the layer was not waited for.
        """
        slot = self._slots[self._step % self.depth]
        if not slot.in_use or layer != self.layers[self._step % len(self.layers)]:
            raise ValueError(f"layer {layer} was released without a wait")
        slot.in_use = False
        slot.step = -1
        if slot.fetch is not None:
            if not slot.whole:
                slot.stale = slot.fetch
            slot.fetch = None
        self._step += 1
        self._fill()
        if self._step % len(self.layers) == 0:
            self._close_window(None)

    def trace(self) -> list[LayerTrace]:
        """The layers of the last batch that have computed, in order; a copy."""
        return list(self._trace)

    def close(self) -> None:
        """Ends every fetch under way; returns when nothing writes to a slot any more."""
        for slot in self._slots:
            if slot.fetch is not None:
                slot.stale, slot.fetch = None if slot.whole else slot.fetch, None
            self._empty(slot)
            slot.step = -1

    def _fill(self) -> None:
        for step in range(self._step, self._step + self.depth):
            slot = self._slots[step % self.depth]
            if slot.step == step or slot.in_use:
                continue
            if slot.fetch is not None:
                # Of a batch that was given up. It is waited for when the slot is needed, not here: nothing stalls yet.
                slot.stale, slot.fetch = None if slot.whole else slot.fetch, None
            slot.step = -1
            if slot.stale is not None and slot.stale.over():
                self._empty(slot)
            if slot.stale is None:
                self._fetch(slot, step)

    def _fetch(self, slot: _Slot, step: int) -> None:
        slot.fetch = self.start(self.layers[step % len(self.layers)], step % self.depth)
        slot.step, slot.whole = step, False

    def _empty(self, slot: _Slot) -> None:
        if slot.stale is not None:
            slot.stale.cancel()
            slot.stale = None

    def _turn(self, layer: int) -> _Slot:
        self._close_window(self.clock())
        if layer != self.layers[self._step % len(self.layers)]:
            raise ValueError(f"layer {layer} is not next; {self.layers[self._step % len(self.layers)]} is")
        slot = self._slots[self._step % self.depth]
        if slot.in_use:
            raise ValueError(f"layer {layer} is computing already")
        return slot

    def _close_window(self, now: float | None) -> None:
        if (last := self._waited) is not None:
            window = None if now is None else now - last.began - last.exposed
            self._trace.append(LayerTrace(last.layer, last.exposed, window, last.gather))
            self._waited = None
