"""What a routing policy is: which request goes to which rank, and when. Ours and other routers' implement it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from asyncep_router.cost import ModelCost
    from asyncep_router.messages import BatchReport, Dispatch, Request


class Policy(Protocol):
    """Events in, instructions out: no clock, no socket. Not thread-safe: one owner calls it.

    Every request submitted is dispatched by a later `poll` or withdrawn by `abort`; every dispatch is reported or
    abandoned. `cost` is the model's and may be replaced. FLOPs are those of whole passes.
    """

    cost: ModelCost

    @property
    def pending(self) -> int:
        """Requests that wait here."""

    def rank_joined(
        self,
        rank: int,
        *,
        caches: bool = True,
        cache_tokens: int | None = None,
        gathers: bool = False,
        threshold: float | None = None,
    ) -> None:
        """A rank takes work from now on, with an empty cache if it is new or comes back from death.

        `caches`: False for a rank without a prefix cache (KV-free mode). `cache_tokens`: its cache's size.
        `gathers`: its T is what hides a gather, so that a batch below T takes as long as one of T. `threshold`: T, in
        FLOPs of a pass; None for what the policy has by default.
        """

    def rank_died(self, rank: int) -> list[Request]:
        """The rank is gone with everything in it. What it had in flight waits again; returns that."""

    def set_accepting(self, rank: int, accepting: bool, *, trial: bool = False) -> None:
        """Drain a rank (False) or let it take work again; on `trial` one request at a time.

        What it has in flight stays there. Raises `UnknownRankError`.
        """

    def cache_cleared(self, rank: int) -> None:
        """Its cache is empty now."""

    def submit(self, request: Request, now: float) -> None:
        """A request arrives. Raises `DuplicateRequestError`, `UnknownRankError` (pinned to no rank)."""

    def poll(self, now: float) -> list[Dispatch]:
        """Everything that is to be sent now. Charged already; the caller only sends."""

    def next_wakeup(self, now: float) -> float | None:
        """When `poll` could have something to say without any event before; None if never."""

    def report(self, report: BatchReport, now: float) -> Any:
        """A rank finished a batch."""

    def abandon(self, rid: str) -> bool:
        """A request in flight will not be reported. True if it was in flight."""

    def abort(self, rid: str = "", *, prefix: bool = False, everything: bool = False) -> list[Request]:
        """Withdraw waiting requests: one id, all ids that begin with `rid`, or everything. Returns those withdrawn."""

    def outstanding(self, rank: int) -> int:
        """FLOPs a rank has in flight."""

    def threshold(self, rank: int) -> float:
        """T of a rank, FLOPs of a pass; 0 if the policy does not care."""

    def snapshot(self) -> dict[str, Any]:
        """The state as plain data, for `/router/state` and metrics: FLOPs, tokens, counts."""
