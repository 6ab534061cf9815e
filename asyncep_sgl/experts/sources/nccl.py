"""A layer gathered by a collective: the paper's variant, and a baseline. Has not run on a GPU.

Every rank takes part in every gather, in the same order; one that idles or dies stops all others, which is why
`asyncep serve` does not offer it. Shards are uneven where the ranks do not divide the experts, so the all-gather is
what NCCL makes of an uneven one: a broadcast from each owner, straight into the slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.device import Device, Stream
from asyncep_sgl.experts.gather.device_source import DeviceSource
from asyncep_sgl.experts.gather.plan import pieces
from asyncep_sgl.experts.sources.cuda import Shard


class NcclSource(DeviceSource):
    """A `gather.LayerSource` whose gathers are collectives.

    Args:
        device: this rank's.
        group: a ``torch.distributed`` process group over the ranks, of NCCL (in tests: Gloo) and of this source alone.
        owned: experts of each rank by layer, one run each.
        own: this rank's shard by (layer, tensor).
    """

    def __init__(
        self,
        device: Device,
        group: Any,
        owned: Mapping[int, Mapping[int, range]],
        own: Mapping[tuple[int, str], Shard],
    ) -> None:
        super().__init__(device, lanes=1)
        self._group = group
        self._rank = int(group.rank())
        self._owned = owned
        self._own = own
        self._broken: GatherError | None = None

    def attach(self) -> None:
        """Raises `GatherError` if the ranks do not own the missing experts among them."""
        for layer, entry in self.layers.items():
            others = {e for rank, run in self._owned[layer].items() if rank != self._rank for e in run}
            if others != set(entry.slot.experts):
                raise GatherError(f"layer {layer}: the other ranks own {sorted(others)}, missing are others")

    def work(self, layer: int, slot: int, lanes: int) -> list[Any]:
        """(root, bytes to send or to receive into), one after the other and in the same order on every rank."""
        entry = self.layers[layer].slot
        found = []
        for root, run in sorted(self._owned[layer].items()):
            if not run:
                continue
            if root == self._rank:
                found += [(root, self._own[layer, name].data) for name in sorted(entry.strides)]
            else:
                for piece in pieces(entry, {root: frozenset(run)}):
                    found.append((root, self.slots[slot, piece.offset : piece.offset + piece.nbytes]))
        return [found]

    def transfer(self, lane: Stream, part: list[tuple[int, torch.Tensor]]) -> None:
        """See `DeviceSource`. NCCL queues behind the current stream; ``wait`` orders that stream behind NCCL."""
        from torch.distributed import BroadcastOptions

        if self._broken is not None:
            # The ranks no longer agree on which collective comes next.
            raise self._broken
        with self.device.on(lane):
            for root, data in part:
                options = BroadcastOptions()
                options.rootRank = root
                try:
                    self._group.broadcast([data], options).wait()
                except RuntimeError as error:
                    self._broken = GatherError(f"the collective from rank {root} broke: {error}")
                    raise self._broken from error
