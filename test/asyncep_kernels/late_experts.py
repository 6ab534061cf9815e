"""Runs inside the interpreter's process: a MoE whose remote experts arrive while its kernels run."""

from __future__ import annotations

import threading

import torch

from asyncep_kernels.moe import triton
from asyncep_kernels.moe.configs import SMALL
from asyncep_kernels.moe.ready import Ready, make_ready
from asyncep_kernels.moe.table import ExpertTable
from asyncep_kernels.permute import reference
from asyncep_kernels.workspace import Workspace


def gathered_while_computing(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, table: ExpertTable, flag_of: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """The output, and the flags in the order in which they were raised.

    Slots of experts with a flag hold NaN. A thread fills those of a flag and raises it only once the kernel has
    stored the gated products of every expert with a lower flag: a kernel that read an expert early would give NaN,
    one that did not go on with the others while one is missing would never end (it would give up, and say so).
    """
    epoch = 7
    w13, w2 = table.entries()
    slots13, slots2 = ([torch.full_like(weight, float("nan")) for weight in side] for side in (w13, w2))
    ready = make_ready(flag_of, epoch, limit=1_000_000)
    workspace = Workspace()
    order = reference.permute(ids, len(w13), SMALL.rows, order=ready.order)
    inter = w2[0].shape[1]
    # The very buffer the kernel will write its gated products to.
    product = workspace.take("moe.product", (order.rows.numel(), inter), hidden.dtype).fill_(float("nan"))
    raised: list[int] = []

    def fill(flag: int) -> None:
        for expert, own in enumerate(flag_of):
            if own == flag:
                slots13[expert].copy_(w13[expert])
                slots2[expert].copy_(w2[expert])

    def copy() -> None:
        for flag in range(ready.flags.numel()):
            earlier = torch.tensor([own < flag for own in flag_of])
            places = order.position[(ids >= 0) & earlier[ids.clamp(min=0)]].long()
            while not bool(product[places].isfinite().all()):
                pass
            fill(flag)
            raised.append(flag)
            ready.flags[flag] = epoch

    fill(-1)
    copier = threading.Thread(target=copy)
    copier.start()
    out = triton.moe(hidden, ids, weights, ExpertTable(slots13, slots2), workspace=workspace, ready=ready)
    copier.join()
    ready.check()
    return out, raised


def without_waiting(
    hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, table: ExpertTable, ready: Ready
) -> torch.Tensor:
    """The output.

    Raises:
        TimeoutError: some expert had not arrived.
    """
    out = triton.moe(hidden, ids, weights, table, ready=ready)
    ready.check()
    return out
