"""How much of a device's peak a kernel reaches, as a function of how much work it gets at once.

One shape for all: e(x) = top · x / (x + half). x is the rows of a matrix product (per expert in a grouped one) or
the tokens of an attended sequence; `top` is reached in the limit, half of it at x = `half`. Then the time of n
rows is proportional to n + half: every product pays for `half` rows more than it has, which makes sums over
experts exact whatever the skew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncep.sim.errors import DataError


@dataclass(frozen=True)
class Curve:
    """`top` in 0..1, a share of peak; `half` at least 0, in the unit of x."""

    top: float
    half: float

    def __post_init__(self) -> None:
        if not 0 < self.top <= 1:
            raise DataError(f"top={self.top!r}: a share of peak lies in 0..1")
        if not self.half >= 0:
            raise DataError(f"half={self.half!r}: must be at least 0")

    def at(self, x: float) -> float:
        """Share of peak at x."""
        return self.top * x / (x + self.half) if x > 0 else 0.0

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """Least squares on x / e(x) = x / top + half / top, each point weighted by e / x, so that relative errors of e
        count alike at every x. `points`: (x, share of peak); one point means half = 0. Raises `DataError`."""
        if not points or any(x <= 0 or not 0 < e <= 1 for x, e in points):
            raise DataError(f"points {points!r}: need (x above 0, share of peak in 0..1)")
        # In units of u = 1 / x: 1 = e (slope + intercept u), linear in slope = 1 / top and intercept = half / top.
        a11 = sum(e * e for _, e in points)
        a12 = sum(e * e / x for x, e in points)
        a22 = sum((e / x) ** 2 for x, e in points)
        b1 = sum(e for _, e in points)
        b2 = sum(e / x for x, e in points)
        determinant = a11 * a22 - a12 * a12
        if determinant <= 1e-12 * a11 * a22:
            return cls(min(1.0, b1 / len(points)), 0.0)
        slope = (b1 * a22 - b2 * a12) / determinant
        intercept = (a11 * b2 - a12 * b1) / determinant
        if intercept < 0:
            slope, intercept = b1 / a11, 0.0
        slope = max(1.0, slope)
        return cls(1 / slope, intercept / slope)
