"""Whose fault a failure is: the request's or the worker's. Pure.

A request can be poison: it makes every worker fail that computes it. So a failure is held against a worker only on
evidence that one client's requests cannot make up:

- another worker answered the very same request, or
- the worker does not let the router connect, or
- it also fails a question of the router's own, which is asked after every failure that nobody else can explain.

A failure that comes the same way from a second worker is the request's, and is booked on nobody.

`Trial` follows one request (or one piece of a batch) over its attempts: how often it is tried, and who is to blame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

_BUSY = frozenset({408, 429})
_UNAVAILABLE = frozenset({502, 503, 504})

QUARANTINED = b"quarantined"
"""Stands in a worker's 500 if the request has ended its ranks twice: no other worker is to be tried."""


class Outcome(Enum):
    """How one attempt ended."""

    ANSWERED = "answered"
    """The worker computed it: a status of 2xx."""
    REFUSED = "refused"
    """Any other final answer: the client's error."""
    BUSY = "busy"
    """408 or 429: the worker has too much to do."""
    UNAVAILABLE = "unavailable"
    """502, 503 or 504."""
    FAILED = "failed"
    """Any other 5xx."""
    QUARANTINED = "quarantined"
    """A 500 that says that this request ends ranks."""
    DROPPED = "dropped"
    """The connection broke after the request had been sent, the answer could not be read, or the worker was found to
    be stuck meanwhile."""
    TIMED_OUT = "timed_out"
    """No answer within `--request-timeout-secs`."""
    UNCONNECTED = "unconnected"
    """No connection came about: the worker never saw the request."""
    GIVEN_UP = "given_up"
    """The worker was removed meanwhile, which does not concern the request."""


_HELD = frozenset({Outcome.UNAVAILABLE, Outcome.FAILED, Outcome.DROPPED, Outcome.TIMED_OUT})
"""Failures that the request may have caused."""

_STRIKES = frozenset({Outcome.FAILED, Outcome.DROPPED, Outcome.TIMED_OUT})
"""The worker had begun with the request: it may be what broke it."""

_MOST_STRIKES = 2
"""After the first strike a request is tried once more, after the second not again."""

_FINAL = frozenset({Outcome.ANSWERED, Outcome.REFUSED, Outcome.QUARANTINED})


def outcome_of(status: int, body: bytes) -> Outcome:
    """What an answer's status and body say."""
    if 200 <= status < 300:
        return Outcome.ANSWERED
    if status in _BUSY:
        return Outcome.BUSY
    if status in _UNAVAILABLE:
        return Outcome.UNAVAILABLE
    if status >= 500:
        return Outcome.QUARANTINED if status == 500 and QUARANTINED in body else Outcome.FAILED
    return Outcome.REFUSED


@dataclass(frozen=True, slots=True)
class Finding:
    """What follows from an attempt.

    Attributes:
        again: the request may be tried once more, if attempts are left.
        succeeded: the worker that did what was asked; None if none did.
        blamed: workers a failure is booked on.
        questioned: workers the router asks a question of its own, because nothing else tells whether they work.
    """

    again: bool = False
    succeeded: str | None = None
    blamed: tuple[str, ...] = ()
    questioned: tuple[str, ...] = ()


@dataclass(slots=True)
class Trial:
    """One request's attempts. Workers are named by their ids.

    Attributes:
        failed: workers at which it failed in a way that it may itself have caused; the next attempt avoids them.
    """

    failed: list[str] = field(default_factory=list)
    _strikes: int = 0

    def record(self, worker: str, outcome: Outcome) -> Finding:
        """An attempt at a worker ended."""
        if outcome is Outcome.ANSWERED:
            return Finding(succeeded=worker, blamed=tuple(other for other in self.failed if other != worker))
        if outcome in _FINAL:
            return Finding()
        questioned: tuple[str, ...] = ()
        if outcome in _HELD:
            if worker not in self.failed:
                self.failed.append(worker)
            self._strikes += outcome in _STRIKES
            # Having failed at two workers it is taken to be at fault; both are asked, in case both are broken.
            questioned = tuple(self.failed)
        return Finding(
            again=self._strikes < _MOST_STRIKES,
            blamed=(worker,) if outcome is Outcome.UNCONNECTED else (),
            questioned=questioned,
        )

    def copy(self) -> Trial:
        """For a part of the request: it shares the past and not the future."""
        return Trial(list(self.failed), self._strikes)
