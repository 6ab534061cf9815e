"""The frontend's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyncep_router.errors import ConfigError

RULES = frozenset(("F1", "F2", "F3"))


@dataclass(frozen=True)
class Limits:
    """How the frontend weighs waiting against placing.

    `inflight_target`: a rank is given work while it has less than this many batches outstanding; 2 is the one it
    computes and the next one. A batch is T, or `least_batch` FLOPs where that is more: T may be next to nothing where
    no weights are gathered, and batches of that would compute badly.
    `most_requests`: a rank is given no more while it has so many outstanding, however little they cost.
    `max_wait`: seconds a request may be held for company while less than a batch of work waits for an idle rank.
    0 sends at once: then no rank is ever idle while work waits.
    `starve_after`: seconds from which a waiting request goes before others of its rank and queue, and has a share
    before higher classes; and seconds it waits at most for a rank to compute a prefix.
    `window`: share of what all ranks compute in a batch each, of which more makes a client's waiting requests, or a
    list, bulk: they let others pass (`fairness.py`).
    `ranks_let_pass`: ranks begin their batches with quick requests, whatever bulk they were sent before; so the first
    class's quick requests go to ranks that are full of bulk too.
    `least_share`: share of the FLOPs that bulk and lower priorities get at least, once they have waited `starve_after`.
    `affinity`: share of a prompt that must be held for it to wait for the rank that holds it rather than
    go to another below T (Preble's rule, more cached than new, is 0.5).
    `block`: tokens by which the pending queue compares prompts. Placement itself is exact to a page.
    `await_prefix`: hold requests back from a rank that is still computing their prefix. Without it they would
    often land in the same batch and compute the prefix once each.
    `await_share`: share of a batch that all who wait for a prefix must save together for them to wait; it stands for
    the gap between a rank's report and its next request.
    `without`: rules that are left out, of F1 (the longest prefix), F2 (net FLOPs: a prefix is charged to everyone
    instead) and F3 (fill a rank to T: the least full one instead), to measure what each is worth.
    `default_threshold`: T in FLOPs of a whole pass, for ranks that have not published theirs.
    """

    inflight_target: float = 2.0
    max_wait: float = 0.0
    starve_after: float = 10.0
    window: float = 0.25
    least_share: float = 0.25
    ranks_let_pass: bool = False
    affinity: float = 0.5
    block: int = 128
    await_prefix: bool = True
    await_share: float = 1 / 64
    least_batch: float = 0.0
    most_requests: float = math.inf
    default_threshold: float = 1e15
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, least in (
            ("inflight_target", 1),
            ("max_wait", 0),
            ("starve_after", 0),
            ("block", 1),
            ("least_batch", 0),
            ("most_requests", 1),
        ):
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be at least {least}")
        for name in ("affinity", "await_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must lie in 0..1")
        for name in ("window", "least_share"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must lie between 0 and 1")
        if self.without - RULES:
            raise ConfigError(f"without={', '.join(sorted(self.without))!r}: the rules are F1, F2 and F3")
        if not self.default_threshold > 0:
            raise ConfigError(f"default_threshold={self.default_threshold!r}: must be above 0")
