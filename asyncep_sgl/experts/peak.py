"""What a rank can compute at most."""

from __future__ import annotations

import time

import torch


def gemm_flops_per_second(
    dtype: torch.dtype, extent: int = 2048, rounds: int = 5, device: torch.device | str = "cpu"
) -> float:
    """FLOPs a second of a square matrix product on this process's threads, or on a device: the best of a few rounds,
    after one to warm.

    Args:
        dtype: of the operands.
        extent: rows and columns.
        rounds: products timed; each is ``2 * extent**3`` FLOPs.
        device: where.
    """

    def settle() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    left, right = (torch.randn(extent, extent, device=device).to(dtype) for _ in range(2))
    out = torch.mm(left, right)
    settle()
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        settle()
        best = min(best, time.perf_counter() - began)
    return 2 * extent**3 / best
