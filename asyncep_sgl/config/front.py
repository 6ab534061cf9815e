"""What the front takes from clients at most. Each flag is declared once: name, default, unit and help. Pure."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from asyncep_sgl.errors import UsageError

# Of text that is no attack. A run of 32 blanks is a token too.
_CHARS_A_TOKEN = 32


def _flag(default: Any, metavar: str, text: str, *, least: float = 1) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text, "least": least})


@dataclass(frozen=True)
class FrontOptions:
    """Bounds on what one client, or all together, may ask of the front. 0 in `max_prompt_chars` means automatic."""

    max_body_bytes: int = _flag(64 << 20, "SIZE", "largest body of a request; larger ones are answered 413")
    max_held_bytes: int = _flag(256 << 20, "SIZE", "bodies of all requests in progress together; more are answered 503")
    max_prompts: int = _flag(16384, "N", "prompts of one request, samples counted (400 beyond)")
    max_prompt_chars: int = _flag(
        0, "N", "characters of one prompt (400 beyond, before anything is tokenized); 0: 32 a token of the context",
        least=0,
    )  # fmt: skip
    max_samples: int = _flag(128, "N", "samples of one prompt, the field n (400 beyond)")
    max_logprobs: int = _flag(
        1_000_000, "N", "log-probabilities in one answer: positions times ids, all prompts together (400 beyond)"
    )
    max_connections: int = _flag(4096, "N", "open connections; further ones are closed at once")
    header_timeout_secs: float = _flag(10.0, "S", "time a client has to send a request's headers", least=0.1)
    body_timeout_secs: float = _flag(30.0, "S", "longest pause in sending a body, or in taking an answer", least=0.1)
    keep_alive_timeout_secs: int = _flag(75, "S", "time after which an unused connection is closed")
    cors_origins: tuple[str, ...] = field(
        default=(),
        metadata={"metavar": "URL", "help": "origins whose pages may call the server from a browser (default none)"},
    )

    def prompt_chars(self, context: int) -> int:
        """Characters of one prompt at most, for a model whose context has so many tokens."""
        return self.max_prompt_chars or _CHARS_A_TOKEN * context


def add_flags(parser: argparse.ArgumentParser, size: Callable[[str], int]) -> None:
    """Adds a flag for each of the settings.

    Args:
        size: reads a number of bytes such as ``64MiB``.
    """
    group = parser.add_argument_group("what clients may ask", "bounds that are checked before any work is done")
    for setting in fields(FrontOptions):
        meta, default = setting.metadata, setting.default
        shown = "" if default == () else f" (default {_shown(default, meta['metavar'])})"
        kind: Any = size if meta["metavar"] == "SIZE" else type(default)
        several = default == ()
        group.add_argument(
            _name(setting.name),
            type=str if several else kind,
            nargs="*" if several else None,
            default=default,
            metavar=meta["metavar"],
            help=meta["help"] + shown,
        )


def read_flags(known: argparse.Namespace) -> FrontOptions:
    """The settings of a parsed command line.

    Raises:
        UsageError: a value is too small, naming its flag.
    """
    given: dict[str, Any] = {}
    for setting in fields(FrontOptions):
        value = getattr(known, _name(setting.name)[2:].replace("-", "_"))
        if setting.default == ():
            value = tuple(value)
        elif value < setting.metadata["least"]:
            raise UsageError(f"{_name(setting.name)} {value}: must be at least {setting.metadata['least']:g}")
        given[setting.name] = value
    return FrontOptions(**given)


def _name(setting: str) -> str:
    return "--asyncep-" + setting.replace("_", "-")


def _shown(default: Any, metavar: str) -> str:
    return (
        f"{default >> 20}MiB" if metavar == "SIZE" else f"{default:,g}" if isinstance(default, float) else str(default)
    )
