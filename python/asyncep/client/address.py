"""Where a server is: a URL as people write it, and sockets that notice when the other end has gone."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

from asyncep.client.errors import OptionError

_IDLE_SECONDS = 30
_BETWEEN_SECONDS = 10
_PROBES = 6


def server_url(url: str, argument: str = "url") -> str:
    """The URL with its scheme (http where none is given) and without a slash at the end.

    Raises:
        OptionError: it is no URL of a server.
    """
    written = url.strip() if isinstance(url, str) else ""
    whole = written if "://" in written else f"http://{written}"
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment or any(character.isspace() for character in whole):
        raise OptionError(f"{argument}={url!r}: give the address of a server, such as http://127.0.0.1:30000")
    return whole.rstrip("/")


def lasting_socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for aiohttp to connect: a peer that is gone without a word is noticed within a minute and a half.

    A prompt's answer may take as long as it takes, so the time without a byte cannot tell.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _BETWEEN_SECONDS)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (_IDLE_SECONDS + _PROBES * _BETWEEN_SECONDS))
    return made
