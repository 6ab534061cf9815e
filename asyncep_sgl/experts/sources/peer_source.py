"""Experts that other hosts keep: chosen, read, checked, and asked for again when a host goes away or starts anew."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.gather.gather import Counters, GatheredLayer
from asyncep_sgl.experts.gather.plan import choose, pieces, waves
from asyncep_sgl.experts.group.peers import Descriptor, View
from asyncep_sgl.experts.group.view import ViewClient
from asyncep_sgl.experts.shard.digest import digest
from asyncep_sgl.experts.sources.arrivals import Arrivals, Wrong
from asyncep_sgl.experts.sources.peer_fetch import LayerFetch, Wave
from asyncep_sgl.experts.sources.remote import Copy, Read, RemoteReader

logger = logging.getLogger(__name__)

_MENTION_SECONDS = 5.0
# So often a rank looks for hosts that it does not read from.
_LOOK_SECONDS = 5.0


class PeerSource:
    """A `gather.LayerSource`. For one thread; its own `Arrivals` only calls `wrong`.

    Args:
        reader: reads other hosts' memory.
        views: asks who is there.
        node, nodes: this host, and how many there are.
        verify: compare what came with its owner's digest.
    """

    def __init__(self, reader: RemoteReader, views: ViewClient, *, node: int, nodes: int, verify: bool) -> None:
        self.counters = Counters()
        self._layers: Mapping[int, GatheredLayer] = {}
        self._slots = torch.empty(0)
        self._reader = reader
        self._views = views
        self._node = node
        self._nodes = nodes
        self._verify = verify
        self.arrivals = Arrivals()
        self._connected: dict[int, Descriptor] = {}
        self._look_at = 0.0
        self._sources: dict[tuple[int, int, str], tuple[int, int]] = {}
        self._digests: dict[tuple[int, int, str, int], int] = {}

    def open(self, layers: Mapping[int, GatheredLayer], slots: torch.Tensor) -> None:
        """See `LayerSource`. Hosts may come in any order, however late."""
        self._layers, self._slots = layers, slots
        self._reader.register(slots)
        self.wait_for_peers()

    def start(self, layer: int, slot: int, experts: Sequence[int] | None = None) -> LayerFetch:
        """See `LayerSource`. Hosts that come late, or again, are read from as well.

        Args:
            experts: of the missing ones, in the order in which they are to come; all by default.
        """
        now = time.monotonic()
        if len(self._connected) < self._nodes - 1 and now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self.refresh()
        entry = self._layers[layer].slot
        wanted = entry.experts if experts is None else experts
        return LayerFetch([Wave(self, layer, slot, part) for part in waves(wanted, sum(entry.strides.values()))])

    def wait_for_peers(self) -> None:
        """Returns once every expert can be read from somewhere."""
        mention = time.monotonic() + _MENTION_SECONDS
        while True:
            view = self.refresh()
            uncovered = [layer for layer in self._layers if self.choose(layer) is None]
            if not uncovered:
                return
            if time.monotonic() >= mention:
                mention += 2 * _MENTION_SECONDS
                away = [str(n.node) for n in view.nodes if not n.alive] + [str(n) for n in view.absent]
                logger.warning("waiting for the experts of node(s) %s", ", ".join(away) or "not known yet")
            time.sleep(0.2)

    def choose(self, layer: int, experts: Sequence[int] | None = None) -> dict[int, frozenset[int]] | None:
        """Which connected host gives which of ``layer``'s missing experts; None while one is nowhere to be had."""
        wanted = self._layers[layer].slot.experts if experts is None else experts
        holders = {
            node: frozenset(tensor.experts)
            for node, descriptor in self._connected.items()
            for tensor in descriptor.tensors
            if tensor.layer == layer
        }
        return choose(wanted, holders, self._node, self._nodes)

    def copies(self, layer: int, slot: int, chosen: Mapping[int, frozenset[int]]) -> dict[int, list[Copy]]:
        """By host, the reads that bring ``chosen`` experts of ``layer`` to their places in ``slot``."""
        found: dict[int, list[Copy]] = {node: [] for node in chosen}
        base = self._slots[slot].data_ptr()
        for piece in pieces(self._layers[layer].slot, chosen):
            address, stride = self._sources[piece.node, layer, piece.name]
            found[piece.node].append(Copy(address + piece.experts.start * stride, base + piece.offset, piece.nbytes))
        return found

    def read(self, node: int, copies: list[Copy]) -> Read:
        """Asks a host for bytes. Raises `PeerLostError`."""
        return self._reader.read(node, copies)

    def wrong(self, layer: int, slot: int, chosen: Mapping[int, frozenset[int]]) -> Wrong:
        """Which of ``chosen`` is in ``slot`` otherwise than its owner wrote it."""
        entry = self._layers[layer].slot
        found: Wrong = []
        if not self._verify:
            return found
        for node, experts in chosen.items():
            for name, stride in entry.strides.items():
                for expert in experts:
                    start = entry.offset(name, expert)
                    if digest(self._slots[slot, start : start + stride]) != self._digests[node, layer, name, expert]:
                        found.append((name, expert, node))
        return found

    # --- the other hosts ----------------------------------------------------------------------------------------

    def refresh(self) -> View:
        """Connects to hosts that are new or have started anew."""
        view = self._views.view()
        for node in view.nodes:
            known = self._connected.get(node.node)
            if node.descriptor is None or not node.alive:
                continue
            if known is not None and known.incarnation == node.descriptor.incarnation:
                continue
            self._connect(node.descriptor)
        return view

    def _connect(self, descriptor: Descriptor) -> None:
        node = descriptor.node
        for tensor in descriptor.tensors:
            entry = self._layers.get(tensor.layer)
            if entry is not None and entry.slot.strides.get(tensor.name) != tensor.stride:
                raise GatherError(
                    f"node {node} has {tensor.stride} bytes an expert of {tensor.name} in layer {tensor.layer}, this "
                    f"host {entry.slot.strides.get(tensor.name)}; start every host with the same model and --dtype"
                )
        try:
            self._reader.connect(node, descriptor.agent)
        except Exception as error:
            logger.warning("node %d cannot be connected to yet: %s", node, error)
            return
        self._connected[node] = descriptor
        for tensor in descriptor.tensors:
            self._sources[node, tensor.layer, tensor.name] = (tensor.address, tensor.stride)
            for expert, value in zip(tensor.experts, tensor.digests, strict=True):
                self._digests[node, tensor.layer, tensor.name, expert] = value

    def lose(self, node: int, connection: int | None = None) -> None:
        """A read from ``node`` broke: nothing of it is taken until it has been connected to again.

        Args:
            connection: the one that broke; if another has taken its place since, that one is kept.
        """
        if node not in self._connected or connection not in (None, self._reader.connection(node)):
            return
        self.counters.peer_losses += 1
        logger.warning("the connection to node %d broke", node)
        self._reader.forget(node)
        self._connected.pop(node, None)

    def gone_or_new(self, nodes: set[int]) -> set[int]:
        """Which of ``nodes`` have started anew, or are away while others could give what they give."""
        view = self._views.view()
        found = set()
        for node in view.nodes:
            known = self._connected.get(node.node)
            if node.node not in nodes or known is None:
                continue
            renewed = node.descriptor is not None and node.descriptor.incarnation != known.incarnation
            if (node.alive and renewed) or (not node.alive and self._dispensable(node.node)):
                found.add(node.node)
        return found

    def _dispensable(self, node: int) -> bool:
        kept = self._connected.pop(node)
        try:
            return all(self.choose(layer) is not None for layer in self._layers)
        finally:
            self._connected[node] = kept
