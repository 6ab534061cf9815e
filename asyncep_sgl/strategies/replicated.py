"""All experts in memory that every rank of the host reads; nothing moves while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncep_sgl.errors import UsageError
from asyncep_sgl.strategies.base import Strategy

if TYPE_CHECKING:
    from asyncep_sgl.command_line import ServeOptions
    from asyncep_sgl.config import GroupConfig


class Replicated(Strategy):
    """What `Strategy` does by itself."""

    name = "replicated"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """Everything that spreads the experts beyond this host's memory."""
        asked = (
            ("--nnodes", options.nodes > 1),
            ("--asyncep-expert-memory", options.expert_memory is not None),
            ("--asyncep-transport", options.transport != "auto" and group.divides),
        )
        for flag, given in asked:
            if given:
                raise UsageError(f"--asyncep-strategy replicated: every host keeps all experts; leave {flag} out")
        if group.divides:
            raise UsageError(
                "--asyncep-strategy replicated: the experts do not fit into one GPU's memory, or there are several "
                "GPUs; use asyncep"
            )
