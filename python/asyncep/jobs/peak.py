"""How many FLOPs a second this host's CPUs can do at best: what MFU is a share of.

``python -m asyncep.jobs.peak`` prints it. A process of its own, because torch takes seconds to load and keeps its
threads.
"""

from __future__ import annotations

import subprocess
import sys
import time

# Rows and columns of the matrices, the largest that this host multiplies in `_MOST_SECONDS` being used: a CPU without
# bf16 instructions may be a thousand times slower than one with.
_SIZES = (128, 256, 512, 1024, 2048)
_MOST_SECONDS = 0.5
_ROUNDS = 6
_LIMIT_SECONDS = 120


def measure_peak() -> float | None:
    """FLOPs a second of a bf16 matrix product of up to 2048 x 2048 x 2048 on all CPUs, the best of six.

    None if it failed or took two minutes: the job does not wait for a figure of its report.
    """
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS)
        return float(done.stdout.split()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def _measure() -> float:
    rate = 0.0
    for size in _SIZES:
        best = min(_product(size) for _ in range(_ROUNDS))
        rate = 2 * size**3 / best
        # The next has eight times the FLOPs.
        if 8 * best > _MOST_SECONDS:
            break
    return rate


def _product(size: int) -> float:
    """Seconds of one product."""
    import torch

    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    began = time.perf_counter()
    left @ right
    return time.perf_counter() - began


if __name__ == "__main__":
    print(_measure())
