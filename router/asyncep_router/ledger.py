"""The books: FLOPs each rank was charged with and has not yet reported done.

A charge is net of the prefix the rank is expected to hold (rule F2) and is made before the request is
sent, so that the second of two requests that arrive together already sees the first. It is settled by
the rank's batch report, or returned when the rank dies. Nothing else changes the books:

    charged = outstanding + settled + returned        for every rank, exactly
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from asyncep_router.errors import DuplicateRequestError, IntegrityError, UnknownRankError

if TYPE_CHECKING:
    from asyncep_router.messages import BatchReport


@dataclass(frozen=True, slots=True)
class Charge:
    """One request in flight. `new` and `cached` are tokens, `flops` net, `at` the time of dispatch.

    `bulk`: others may pass it on its rank.
    """

    rid: str
    rank: int
    flops: int
    new: int
    cached: int
    at: float
    bulk: bool = False


@dataclass(slots=True)
class Account:
    """One rank's books, FLOPs; see the module for the identity between them."""

    outstanding: int = 0
    quick: int = 0
    """Of `outstanding`, what is not bulk."""
    quick_requests: int = 0
    charged: int = 0
    settled: int = 0
    returned: int = 0
    in_flight: dict[str, Charge] = field(default_factory=dict)
    saved_flops: int = 0
    """What the requests charged would have cost more without the cache."""
    expected_cached: int = 0
    """Tokens expected in the cache, over settled requests that reported what they found."""
    found_cached: int = 0
    """Tokens those requests found."""
    flops_per_second: float = 0.0
    """Moving average of what batches achieved; 0 until the first report with a duration."""

    def hold(self, charge: Charge, sign: int) -> None:
        """A charge begins (1) or ends (-1) to be outstanding."""
        self.outstanding += sign * charge.flops
        if not charge.bulk:
            self.quick += sign * charge.flops
            self.quick_requests += sign


class Ledger:
    """Accounts of all ranks. Deterministic, no clock."""

    # One report weighs this much in the moving average: the last dozen batches or so decide.
    _SMOOTHING = 0.15

    def __init__(self) -> None:
        self._accounts: dict[int, Account] = {}
        self._where: dict[str, int] = {}
        self.unknown_reports = 0
        """Request ids reported that were not in flight (aborted meanwhile, or sent past the router)."""

    def open(self, rank: int) -> None:
        """Open an empty account; one that exists stays."""
        self._accounts.setdefault(rank, Account())

    def account(self, rank: int) -> Account:
        """The books of a rank. Raises `UnknownRankError`."""
        try:
            return self._accounts[rank]
        except KeyError:
            raise UnknownRankError(f"rank {rank} has no account") from None

    def rank_of(self, rid: str) -> int | None:
        """Where a request in flight is."""
        return self._where.get(rid)

    def charge(self, charge: Charge, saved_flops: int = 0) -> None:
        """Book a request to its rank. Raises `DuplicateRequestError`, `UnknownRankError`."""
        if charge.rid in self._where:
            raise DuplicateRequestError(f"{charge.rid!r} is in flight on rank {self._where[charge.rid]}")
        account = self.account(charge.rank)
        account.in_flight[charge.rid] = charge
        account.hold(charge, 1)
        account.charged += charge.flops
        account.saved_flops += saved_flops
        self._where[charge.rid] = charge.rank

    def settle(self, report: BatchReport) -> list[Charge]:
        """Book a finished batch; returns what was settled, ids not in flight on that rank left out."""
        account = self.account(report.rank)
        done = []
        for rid in report.rids:
            charge = account.in_flight.pop(rid, None)
            if charge is None:
                self.unknown_reports += 1
                continue
            del self._where[rid]
            account.hold(charge, -1)
            account.settled += charge.flops
            found = report.cached.get(rid)
            if found is not None:
                account.expected_cached += charge.cached
                account.found_cached += found
            done.append(charge)
        if report.seconds > 0 and report.flops > 0:
            rate = report.flops / report.seconds
            old = account.flops_per_second
            account.flops_per_second = old + self._SMOOTHING * (rate - old) if old else rate
        return done

    def take_back(self, rid: str) -> Charge | None:
        """Return one charge: the request left its rank unfinished."""
        rank = self._where.pop(rid, None)
        if rank is None:
            return None
        account = self._accounts[rank]
        charge = account.in_flight.pop(rid)
        account.hold(charge, -1)
        account.returned += charge.flops
        return charge

    def take_back_all(self, rank: int) -> list[Charge]:
        """Return everything in flight on a rank, in order of dispatch."""
        rids = list(self.account(rank).in_flight)
        return [charge for rid in rids if (charge := self.take_back(rid)) is not None]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every account's identity holds."""
        for rank, account in self._accounts.items():
            flying = sum(charge.flops for charge in account.in_flight.values())
            if flying != account.outstanding:
                raise IntegrityError(f"rank {rank}: {flying} FLOPs fly, {account.outstanding} outstanding")
            quick = [charge.flops for charge in account.in_flight.values() if not charge.bulk]
            if (sum(quick), len(quick)) != (account.quick, account.quick_requests):
                raise IntegrityError(f"rank {rank}: {len(quick)} quick requests fly, booked are others: {account}")
            if account.charged != account.outstanding + account.settled + account.returned:
                raise IntegrityError(f"rank {rank}: charged {account.charged} is not the sum of {account}")
        if sum(len(account.in_flight) for account in self._accounts.values()) != len(self._where):
            raise IntegrityError("requests in flight and the index of where they are disagree")
