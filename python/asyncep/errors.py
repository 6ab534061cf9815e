"""What the commands say instead of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """Its message is for whoever typed the command: what is wrong, and what to do."""
