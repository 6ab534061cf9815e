"""All experts in memory that every rank of the host reads; nothing moves while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncep_sgl.strategies.base import Strategy

if TYPE_CHECKING:
    from asyncep_sgl.config.options import ServeOptions
    from asyncep_sgl.config.run import GroupConfig


class Replicated(Strategy):
    """What `Strategy` does by itself."""

    name = "replicated"

    @classmethod
    def refuse(cls, options: ServeOptions, group: GroupConfig) -> None:
        """Everything that spreads the experts. SGLang's own operators serve as well."""
        cls._refuse_divided(options, group)
