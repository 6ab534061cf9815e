"""What a rank can compute at most."""

from __future__ import annotations

import time

import torch

# A rank starts only after this: a core that has no instructions for the dtype is measured on smaller matrices.
_SECONDS = 1.0
_SMALLEST = 256


def gemm_flops_per_second(
    dtype: torch.dtype, extent: int = 2048, rounds: int = 5, device: torch.device | str = "cpu"
) -> float:
    """FLOPs a second of a square matrix product on this process's threads, or on a device: the best of a few rounds,
    after one to warm.

    Args:
        dtype: of the operands.
        extent: rows and columns at most. Fewer are multiplied where so many would take longer than about a second.
        rounds: products timed; each is ``2 * rows**3`` FLOPs.
        device: where.
    """

    def settle() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    def seconds(rows: int) -> float:
        left, right = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
        out = torch.mm(left, right)
        settle()
        best = float("inf")
        for _ in range(rounds):
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            settle()
            best = min(best, time.perf_counter() - began)
        return best

    rows = min(_SMALLEST, extent)
    best = seconds(rows)
    # Twice the rows take eight times as long.
    while 2 * rows <= extent and 8 * best * (rounds + 1) < _SECONDS:
        rows *= 2
        best = seconds(rows)
    return 2 * rows**3 / best
