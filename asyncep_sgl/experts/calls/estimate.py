"""How long a worker takes for a call, learned from those it has answered. Pure."""

from __future__ import annotations

from dataclasses import dataclass

# A call of few rows takes about as long as one of so many: weights are read, and messages are on their way.
_LEAST_ROWS = 64
# What is slower than expected counts at once, what is faster little by little.
_SLOWER, _FASTER = 0.5, 0.05
# A call is late after so many times what it is expected to take, never sooner than after so many seconds, and never
# later.
LATE_FACTOR = 4.0
LATE_SECONDS = 0.05
MOST_SECONDS = 5.0
# While nothing is known.
FIRST_SECONDS = 2.0


@dataclass
class Estimate:
    """Of one worker, as one caller sees it."""

    _seconds_per_row: float | None = None

    def expected(self, rows: int) -> float | None:
        """Seconds until the last answer to a call; None before any was seen."""
        per_row = self._seconds_per_row
        return None if per_row is None else per_row * (_LEAST_ROWS + rows)

    def late(self, rows: int) -> float:
        """Seconds without an answer after which a call is late."""
        expected = self.expected(rows)
        return FIRST_SECONDS if expected is None else min(MOST_SECONDS, max(LATE_SECONDS, LATE_FACTOR * expected))

    def took(self, rows: int, seconds: float) -> None:
        """A call was answered whole after so long, or given up."""
        per_row = seconds / (_LEAST_ROWS + rows)
        known = self._seconds_per_row
        if known is None:
            self._seconds_per_row = per_row
        else:
            self._seconds_per_row = known + (_SLOWER if per_row > known else _FASTER) * (per_row - known)


@dataclass
class Trust:
    """Whether a worker is asked: one that was late three times in a row is left alone for a while."""

    misses: int = 0
    until: float = 0.0

    MOST = 3
    REST_SECONDS = 5.0

    def answered(self) -> None:
        """In time."""
        self.misses = 0

    def missed(self, now: float) -> None:
        """Late, or declined."""
        self.misses += 1
        if self.misses >= self.MOST:
            self.misses, self.until = 0, now + self.REST_SECONDS

    def may_be_asked(self, now: float) -> bool:
        """Whether it is worth trying."""
        return now >= self.until
