"""URLs and keys of workers: checked before anything is sent there. Pure."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from asyncep_router.errors import ConfigError

_LONGEST_URL = 2048
_LONGEST_KEY = 512


def normalize(url: str) -> str:
    """The form in which workers are compared. Raises `ConfigError`; the message never shows a password."""
    url = url.strip()
    if "://" not in url:
        url = f"http://{url}"
    if len(url) > _LONGEST_URL:
        raise ConfigError(f"worker URL: has {len(url)} characters, at most {_LONGEST_URL} are allowed")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"worker URL: {error}; must be http://HOST:PORT") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigError("worker URL: must not contain a user or password; give the worker's key as api_key")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"worker URL {url!r}: must be http://HOST:PORT or https://HOST:PORT")
    if not parts.hostname or any(not character.isprintable() or character.isspace() for character in url):
        raise ConfigError(f"worker URL {url!r}: must be http://HOST:PORT, without blanks")
    if port == 0 or parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigError(f"worker URL {url!r}: must be http://HOST:PORT, nothing behind it but a path")
    host = parts.hostname if ":" not in parts.hostname else f"[{parts.hostname}]"
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def worker_key(value: Any) -> str | None:
    """A worker's key as a request or flag gives it. Raises `ConfigError`."""
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_KEY:
        raise ConfigError(f"api_key: a string of 1 to {_LONGEST_KEY} characters is needed")
    if not all("!" <= character <= "~" for character in value):
        raise ConfigError("api_key: only printable ASCII characters without blanks can be sent to a worker")
    return value
