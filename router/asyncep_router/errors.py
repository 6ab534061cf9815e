"""Every error this package raises on purpose, on one page.

Each also subclasses the builtin nearest in meaning, so a caller that knows nothing of us still
catches what it expects.
"""

from __future__ import annotations


class RouterError(Exception):
    """Base of all errors raised on purpose by the router."""


class UnsupportedModelError(RouterError, ValueError):
    """The model's configuration describes layers the cost model has no formula for."""


class ConfigError(RouterError, ValueError):
    """A setting has a value it cannot have; the message names the setting and the value."""


class UnknownRankError(RouterError, KeyError):
    """A rank was named that never joined."""


class DuplicateRequestError(RouterError, ValueError):
    """A request id was submitted again while the first one is still pending or in flight."""


class IntegrityError(RouterError, AssertionError):
    """Our own bug: two books that must agree do not. The message carries both figures."""


class TraceError(RouterError, ValueError):
    """A trace file does not have the form it should; the message names file and line."""
