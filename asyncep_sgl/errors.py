"""Every error this package raises on purpose. Each message names what to change."""

from __future__ import annotations


class AsyncEPError(Exception):
    """Base of all of them. ``str(error)`` is one line for the operator."""


class UsageError(AsyncEPError):
    """A flag or a combination of flags that cannot be served."""


class UnsupportedModelError(AsyncEPError):
    """The checkpoint is of a kind that this runtime does not serve."""


class StoreError(AsyncEPError):
    """The expert store refused or could not be reached."""


class GatherError(AsyncEPError):
    """Experts of another host did not come, or came wrong."""


class SeamError(AsyncEPError):
    """Upstream SGLang is not what a seam of ours was written against."""
