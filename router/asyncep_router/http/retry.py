"""How long to wait before trying again: exponential backoff with jitter. Pure. `judgement` says whether to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RetryPolicy:
    """At most `retries` attempts after the first; times in seconds. `jitter` is a share of the delay, both ways."""

    retries: int = 5
    initial: float = 0.05
    longest: float = 30.0
    multiplier: float = 1.5
    jitter: float = 0.2

    def delay(self, attempt: int, draw: float) -> float | None:
        """Seconds to wait after the `attempt`-th failure (from 0), or None: no attempt is left.

        `draw` lies in 0..1 and is the caller's chance.
        """
        if attempt >= self.retries:
            return None
        try:
            base = min(self.initial * self.multiplier**attempt, self.longest)
        except OverflowError:
            base = self.longest
        return min(base * (1 + self.jitter * (2 * draw - 1)), self.longest)
