"""Who is in the group, and who of them lives. Pure, time injected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from asyncep_sgl.experts.group.peers import Card

# What has to be the same on every host, and the flag that makes it so.
_SHARED = {
    "version": "install the same version of this package",
    "model": "give every host the same checkpoint (--model-path, --revision, --dtype)",
    "nodes": "give every host the same --nnodes",
    "ranks": "give every host the same --dp-size",
    "copies": "give every host the same --asyncep-copies",
    "resident_layers": "give every host the same --asyncep-resident-layers",
    "resident_experts": "give every host the same --asyncep-resident-experts",
    "strategy": "give every host the same --asyncep-strategy",
    "isa": "rows that are computed with other instructions have other bits; set ASYNCEP_CPU_ISA to one that all have, "
    "or give --asyncep-strategy asyncep",
}


@dataclass
class Membership:
    """One host's book of the group.

    Attributes:
        own: this host.
        patience: seconds of silence after which a host counts as gone.
    """

    own: Card
    patience: float
    _cards: dict[int, Card] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)

    def admit(self, card: Card, now: float) -> str | None:
        """A host has introduced itself. Returns why it cannot be admitted, or None and takes it in."""
        for name, fix in _SHARED.items():
            mine, theirs = getattr(self.own, name), getattr(card, name)
            if mine != theirs:
                return f"{name} is {theirs} on node {card.node} and {mine} on node {self.own.node}; {fix}"
        if not 0 <= card.node < self.own.nodes:
            return f"--node-rank {card.node} does not exist among --nnodes {self.own.nodes}"
        known = self.own if card.node == self.own.node else self._cards.get(card.node)
        if known is not None and known.incarnation != card.incarnation:
            # A server whose exporter had to be started again is still the same server.
            stranger = known.launcher != card.launcher
            taken = card.node == self.own.node or (stranger and self.alive(card.node, now))
            if taken:
                return f"--node-rank {card.node} is taken by {known.address}; give each host its own"
            if card.incarnation < known.incarnation:
                return f"node {card.node} has started anew since; this process is the older one"
        self._cards[card.node] = card
        self._heard[card.node] = now
        return None

    def learn(self, cards: Iterable[Card], now: float) -> None:
        """What another host knows. The first is its own card and a sign of its life; the rest is hearsay."""
        for position, card in enumerate(cards):
            if card.node == self.own.node:
                continue
            known = self._cards.get(card.node)
            if known is None or card.incarnation >= known.incarnation:
                # Hearsay is never newer than what the host itself said in this incarnation.
                if position == 0 or known is None or card.incarnation > known.incarnation:
                    self._cards[card.node] = card
                if position == 0:
                    self._heard[card.node] = now

    def alive(self, node: int, now: float) -> bool:
        """Whether the host has been heard of lately, directly."""
        return node in self._heard and now - self._heard[node] <= self.patience

    def cards(self) -> tuple[Card, ...]:
        """Everybody known, this host first."""
        return (self.own, *(self._cards[node] for node in sorted(self._cards)))

    def card(self, node: int) -> Card | None:
        """What is known of another host."""
        return self._cards.get(node)

    def absent(self) -> tuple[int, ...]:
        """Hosts nobody has heard of."""
        return tuple(n for n in range(self.own.nodes) if n != self.own.node and n not in self._cards)
