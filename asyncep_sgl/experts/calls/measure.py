"""What computing costs on this machine, measured on a layer's own experts while nothing else computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch

from asyncep_kernels.moe import cpu
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.gather.pipeline import Fetch

# Rows of an expert: few, so that reading its weights is what takes time; and many.
_FEW, _MANY = 8, 128
_ROUNDS = 3


def seconds_of_work(table: ExpertTable, own: Collection[int]) -> tuple[float, float]:
    """Seconds of any rows of an expert, because its weights are read, and of one row more.

    Args:
        table: a layer's experts.
        own: those of them that have contents.
    """
    chosen = torch.tensor(sorted(own), dtype=torch.int32)
    width = table.w2[0].shape[0]
    few, many = (
        _seconds(torch.randn(rows * len(chosen), width).to(table.w2[0].dtype), chosen.repeat(rows), table)
        for rows in (_FEW, _MANY)
    )
    row = max(0.0, many - few) / ((_MANY - _FEW) * len(chosen))
    return max(0.0, few / len(chosen) - _FEW * row), row


def share_of_copying(table: ExpertTable, own: Collection[int], start: Callable[[], Fetch]) -> float:
    """Share of a core that is taken while experts come over the link: how much slower it computes meanwhile.

    Args:
        table, own: as for `seconds_of_work`.
        start: begins to fetch something large.

    Returns:
        0 and up; 0 too where a fetch is over before anything is computed, or is disturbed again and again.
    """
    chosen = torch.tensor(sorted(own), dtype=torch.int32).repeat(_FEW)
    hidden = torch.randn(len(chosen), table.w2[0].shape[0]).to(table.w2[0].dtype)
    alone = _seconds(hidden, chosen, table)
    order = cpu.sort(chosen[:, None], len(table.w13))
    results = torch.empty(hidden.shape, dtype=cpu.results_dtype(hidden, table))
    for _ in range(_ROUNDS):
        fetch = start()
        began, times = time.perf_counter(), 0
        while not fetch.over():
            cpu.run(hidden, order, table, results)
            times += 1
        took = time.perf_counter() - began
        if fetch.wait().exact and times:
            return max(0.0, took - times * alone) / took
    return 0.0


def _seconds(hidden: torch.Tensor, experts: torch.Tensor, table: ExpertTable) -> float:
    order = cpu.sort(experts[:, None], len(table.w13))
    results = torch.empty(hidden.shape, dtype=cpu.results_dtype(hidden, table))
    found = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        cpu.run(hidden, order, table, results)
        found.append(time.perf_counter() - began)
    return min(found)
