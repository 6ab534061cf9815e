"""From which FLOPs on computing a layer takes longer than gathering one. Pure.

The window of a layer is fitted as ``fixed + per_flop * FLOPs`` over the batches seen, old ones forgotten little by
little. The true curve bends where the gather is just hidden: below it, all of the computation shares the core with what
comes in, above it a part. A line through both sides lies too low there, so batches count by how near they are to it.

T after the paper is ``t_EP * F * gamma`` with F the device's peak; measured, it is where the fitted window reaches
``t_EP * gamma``: a device does not reach its peak, so the measured T is the lower of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

# A batch counts half as much after this many others.
_HALF_LIFE = 200.0
# Weight of the batches from which on the fit is believed: one of half the window of interest, or many smaller ones.
_KNOWN = 0.25


@dataclass
class WindowModel:
    """Weighted least squares with forgetting over (FLOPs of a layer, seconds of its window)."""

    _weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def add(self, flops: float, seconds: float, weight: float = 1.0) -> None:
        """One batch: mean FLOPs and mean window of its layers."""
        keep = 0.5 ** (1 / _HALF_LIFE)
        # Scaled so that squares of FLOPs stay within a float's precision.
        x = flops / 1e9
        self._weight = self._weight * keep + weight
        self._x = self._x * keep + weight * x
        self._y = self._y * keep + weight * seconds
        self._xx = self._xx * keep + weight * x * x
        self._xy = self._xy * keep + weight * x * seconds

    def line(self) -> tuple[float, float]:
        """(fixed seconds, seconds a FLOP); through the origin while the batches are too alike to tell. (0, 0): none."""
        if not self._weight or not self._xx:
            return 0.0, 0.0
        spread = self._xx * self._weight - self._x**2
        if spread > 1e-6 * self._xx * self._weight:
            slope = (self._xy * self._weight - self._x * self._y) / spread
            fixed = (self._y - slope * self._x) / self._weight
            if slope > 0 and fixed >= 0:
                return fixed, slope / 1e9
        return 0.0, self._xy / self._xx / 1e9

    @property
    def known(self) -> bool:
        """Whether batches have come near enough to the window of interest for the fit to be believed."""
        return self._weight >= _KNOWN

    def saturation(self, seconds: float) -> float | None:
        """FLOPs of a layer whose window lasts ``seconds``; None before any batch."""
        fixed, per_flop = self.line()
        if per_flop <= 0:
            return None
        return max(0.0, seconds - fixed) / per_flop


def nearness(seconds: float, other: float) -> float:
    """How much a batch counts whose window is ``seconds`` where the window of interest is ``other``: 1 at most."""
    return min(seconds / other, other / seconds) ** 2 if seconds > 0 and other > 0 else 0.0


def peak_threshold(seconds: float, flops_per_second: float, margin: float) -> float:
    """T of a layer after the paper: ``t_EP * F * gamma``, in FLOPs."""
    return seconds * flops_per_second * margin
