"""What can go wrong between us and a server."""

from __future__ import annotations

from asyncep.errors import CommandError


class ServerError(CommandError, RuntimeError):
    """The server cannot be reached or answers something else than it should."""


class OptionError(ValueError):
    """An argument that cannot be used; the message names it."""


# Answers that no prompt is the reason of: no key, or no such endpoint.
NOT_THE_PROMPTS = (401, 403, 404, 405)


class RejectedError(ValueError):
    """The server refuses the request itself (4xx); sending it again would not help.

    Attributes:
        status: of the answer; 0 where there was none.
    """

    status: int = 0
