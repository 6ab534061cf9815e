"""How busy a host's cores are with other work than the worker's."""

from __future__ import annotations

import os
import time
from collections.abc import Collection

import psutil

# The kernel counts in ticks of 10 ms: a shorter look says little.
_LOOK_SECONDS = 0.1


class Busy:
    """For one thread.

    Args:
        cpus: numbers of the cores that this host computes on.
    """

    def __init__(self, cpus: Collection[int]) -> None:
        self._cpus = sorted(cpus)
        self._share = 0.0
        self._at = time.monotonic()
        self._others = self._seconds()

    def share(self) -> float:
        """0: nobody else computes; 1: all cores are used by others. Over the last tenth of a second or more."""
        now = time.monotonic()
        if now - self._at >= _LOOK_SECONDS:
            others = self._seconds()
            used = (others - self._others) / (len(self._cpus) * (now - self._at))
            self._share = min(1.0, max(0.0, used))
            self._at, self._others = now, others
        return self._share

    def _seconds(self) -> float:
        """Processor time that others have used on these cores so far."""
        own = os.times()
        cores = psutil.cpu_times(percpu=True)
        # A container may see fewer cores than their numbers say.
        seen = [cores[cpu] for cpu in self._cpus if cpu < len(cores)]
        used: float = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) for core in seen)
        return used - own.user - own.system
