"""The public face: command line, runtime and jobs.

from asyncep import Runtime
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncep.runtime.runtime import Runtime
    from asyncep.tasks.results import Classification, Ranked, Score, TokenLogProbs

__all__ = ["Classification", "Ranked", "Runtime", "Score", "TokenLogProbs"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for: `asyncep --help` should not wait for an HTTP client."""
    if name == "Runtime":
        from asyncep.runtime.runtime import Runtime

        return Runtime
    if name in __all__:
        from asyncep.tasks import results

        return getattr(results, name)
    raise AttributeError(f"module 'asyncep' has no attribute {name!r}")
