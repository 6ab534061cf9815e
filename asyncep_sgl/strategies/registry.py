"""Strategies by name: ours, and any class that ``MODULE:CLASS`` names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from asyncep_sgl.errors import UsageError
from asyncep_sgl.strategies.base import Strategy

if TYPE_CHECKING:
    from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig

# Imported only when asked for: each process pays for the one strategy that it runs.
_OURS = {
    "replicated": "asyncep_sgl.strategies.replicated:Replicated",
    "asyncep": "asyncep_sgl.strategies.asyncep.strategy:AsyncEP",
    "ep": "asyncep_sgl.strategies.calls.strategy:ExpertParallel",
    "auto": "asyncep_sgl.strategies.calls.strategy:Auto",
}
# For tests. What follows the colon is the strategy's own.
_WITH_SEED = {"random": "asyncep_sgl.strategies.calls.strategy:AtRandom"}
NAMES: tuple[str, ...] = tuple(_OURS)


def find(name: str) -> type[Strategy]:
    """The strategy of a name, or of a ``MODULE:CLASS`` that Python can import.

    Raises:
        UsageError: there is none.
    """
    ours = _OURS.get(name) or _WITH_SEED.get(name.partition(":")[0])
    module_name, colon, class_name = (ours or name).partition(":")
    known = f"use {', '.join(NAMES)}, or MODULE:CLASS of a strategy of your own"
    if not (module_name and colon and class_name):
        raise UsageError(f"--asyncep-strategy {name}: {known}")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:
        # Whatever the module does when it is imported.
        raise UsageError(f"--asyncep-strategy {name}: {error}; {known}") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise UsageError(f"--asyncep-strategy {name}: {class_name} is no asyncep_sgl.strategies.base.Strategy")
    return found


def default(group: GroupConfig) -> str:
    """The strategy of a run whose command line names none."""
    if group.nodes > 1 and group.gathers:
        return "auto"
    return "asyncep" if group.divides else "replicated"


def of(config: AsyncEPConfig) -> Strategy:
    """The run's strategy."""
    return find(config.strategy)(config)
