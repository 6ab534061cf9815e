"""The strategy of the rank that this process is. Operators find it here, whom SGLang calls with a layer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncep_sgl.strategies.base import RankStrategy

_rank: RankStrategy | None = None


def take(strategy: RankStrategy | None) -> None:
    """This process is a rank of this strategy; None, it is none."""
    global _rank
    _rank = strategy


def rank() -> RankStrategy | None:
    """None in a process that is no rank of ours."""
    return _rank
