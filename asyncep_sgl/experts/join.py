"""A rank's way into the expert store: the kind of manager that belongs to where the experts lie."""

from __future__ import annotations

from typing import Literal

from asyncep_sgl.config.run import GroupConfig
from asyncep_sgl.experts.shard.manager import ExpertManager


def join_store(
    transport: Literal["host", "cuda", "pinned"], rank: int, ranks: int, address: str, group: GroupConfig
) -> ExpertManager:
    """A rank's side of the store, of the kind that belongs to where the experts lie.

    Raises:
        StoreError: see `ExpertManager.join`.
    """
    kind: type[ExpertManager] = ExpertManager
    if transport != "host":
        # Imported only now: a CPU's ranks have no need of them.
        from asyncep_sgl.experts.sources.device_managers import DeviceExpertManager, PinnedExpertManager

        kind = DeviceExpertManager if transport == "cuda" else PinnedExpertManager
    return kind.join(rank, ranks, address, group)
