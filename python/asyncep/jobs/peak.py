"""How many FLOPs a second this host's CPUs can do at best: what MFU is a share of.

``python -m asyncep.jobs.peak`` prints it. A process of its own, because torch takes seconds to load and keeps its
threads.
"""

from __future__ import annotations

import subprocess
import sys
import time

_SIZE = 2048
_ROUNDS = 6


def measure_peak() -> float | None:
    """FLOPs a second of a bf16 matrix product of 2048 x 2048 x 2048 on all CPUs, the best of six; None if it failed."""
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, check=False)
    try:
        return float(done.stdout.split()[-1])
    except (ValueError, IndexError):
        return None


def _measure() -> float:
    import torch

    left, right = (torch.randn(_SIZE, _SIZE).to(torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * _SIZE**3 / best


if __name__ == "__main__":
    print(_measure())
