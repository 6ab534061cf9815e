"""A rank that is idle and helps: ``help_process.py BOARD RANKS RANK THREADS EXPERTS WIDTH INTER``.

See test_helping_processes.
"""

from __future__ import annotations

import sys

import torch

from asyncep_kernels.help.visits import Weights
from asyncep_kernels.moe.table import ExpertTable
from asyncep_sgl.experts.help.helper import Helper
from asyncep_sgl.experts.help.offering import join_board


def table(experts: int, width: int, inter: int) -> ExpertTable:
    """The same weights in each process."""
    generator = torch.Generator().manual_seed(5)
    w13 = (torch.randn(experts, 2 * inter, width, generator=generator) / 8).bfloat16()
    w2 = (torch.randn(experts, width, inter, generator=generator) / 6).bfloat16()
    return ExpertTable(w13, w2)


def main() -> None:
    board, (ranks, rank, threads, *shape) = sys.argv[1], map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    helper = Helper(join_board(board, ranks, rank), Weights({0: table(*shape)}))
    helper.start()
    print("helps", flush=True)
    sys.stdin.read()
    helper.close()


if __name__ == "__main__":
    main()
