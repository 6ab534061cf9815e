"""API keys and whose they are. Pure but for reading the key file.

A server has one key for clients, one for its administrator, or a file with a key for each of several clients. Keys are
compared in constant time and never shown: `Keys` and `Caller` can be printed and logged.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asyncep_router.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_KEY = 512
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Attributes:
        name: the key's name; files and batches belong to it. Empty where the server has no keys.
        admin: holds the administrator's key.
        prompts_per_second: rate of prompts above which this caller gets 429; None has no limit of its own.
        file_bytes: quota of this caller's files in ``/v1/files``; None has the server's.
    """

    name: str
    admin: bool = False
    prompts_per_second: float | None = None
    file_bytes: int | None = None


NOBODY = Caller("")
"""The caller of a server without keys."""


@dataclass(frozen=True)
class Keys:
    """The keys of a server. Without any, everybody is `NOBODY`.

    Attributes:
        holders: caller by key. Not shown when printed.
    """

    holders: Mapping[str, Caller] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self.holders)

    @property
    def admin(self) -> bool:
        """Whether one of the keys is an administrator's."""
        return any(caller.admin for caller in self.holders.values())

    @property
    def clients(self) -> bool:
        """Whether one of the keys is a client's: clients without a key are then refused."""
        return any(not caller.admin for caller in self.holders.values())

    @staticmethod
    def of(api_key: str | None = None, admin_key: str | None = None, file: str | Path | None = None) -> Keys:
        """The keys of the three flags.

        Args:
            api_key: of ``--api-key``; its holder is the caller ``default``.
            admin_key: of ``--admin-api-key``; its holder is the caller ``admin``.
            file: of ``--api-key-file``, see `read_key_file`.

        Raises:
            ConfigError: a key is empty or stands twice, or the file cannot be read.
        """
        holders: dict[str, Caller] = {}
        for flag, key, caller in (
            ("--api-key", api_key, Caller("default")),
            ("--admin-api-key", admin_key, Caller("admin", admin=True)),
        ):
            if key is None:
                continue
            if not key.strip():
                raise ConfigError(f"{flag}: the key is empty; leave the flag out to serve without one")
            if key in holders:
                raise ConfigError(f"{flag}: the same key as --api-key; clients would be administrators")
            holders[key] = caller
        for key, caller in (read_key_file(Path(file)) if file is not None else {}).items():
            if key in holders:
                raise ConfigError(f"--api-key-file {file}: the key of {caller.name!r} is also that of another flag")
            if any(caller.name == other.name for other in holders.values()):
                raise ConfigError(f"--api-key-file {file}: the name {caller.name!r} belongs to another flag's key")
            holders[key] = caller
        return Keys(holders)

    def named(self, name: str) -> Caller | None:
        """The caller of this name; None where no key is theirs."""
        return next((caller for caller in self.holders.values() if caller.name == name), None)

    def holder(self, authorization: str | None) -> Caller | None:
        """The caller whose key an ``Authorization`` header carries; None if it carries none that is known.

        The scheme ``Bearer`` may be written in any case (RFC 9110, section 11.1).
        """
        scheme, _, given = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer":
            return None
        found = None
        secret = given.strip().encode()
        # Every key is compared, so that the time tells nothing about which ones there are.
        for key, caller in self.holders.items():
            if hmac.compare_digest(secret, key.encode()):
                found = caller
        return found


def key_from(given: str | None, variable: str) -> str | None:
    """The key of a flag, or where the flag is silent that of an environment variable.

    A flag's value ``@PATH`` names a file whose first line is the key.

    Raises:
        ConfigError: the file cannot be read.
    """
    if given is None:
        return os.environ.get(variable) or None
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text().partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{given[1:]}: the key cannot be read from it: {error}") from error


def read_key_file(path: Path) -> dict[str, Caller]:
    """Callers by key, from lines ``NAME KEY [admin] [prompts_per_second=N] [file_bytes=SIZE]``.

    Empty lines and lines that begin with ``#`` are skipped. Sizes may be written as 500MB or 2GiB.

    Raises:
        ConfigError: the file cannot be read, others may read it, or a line is wrong; the line's number, never its key.
    """
    try:
        text = path.read_text()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-key-file {path}: {error}") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"--api-key-file {path}: other users may read or write it; run chmod 600 {path}")
    holders: dict[str, Caller] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            key, caller = _read_line(words)
            if key in holders:
                raise ConfigError("this key stands in an earlier line too")
            if any(caller.name == other.name for other in holders.values()):
                raise ConfigError(f"the name {caller.name!r} stands in an earlier line too")
        except ConfigError as error:
            raise ConfigError(f"--api-key-file {path}, line {number}: {error}") from None
        holders[key] = caller
    if not holders:
        raise ConfigError(f"--api-key-file {path}: no line with a name and a key")
    return holders


def _read_line(words: list[str]) -> tuple[str, Caller]:
    if len(words) < 2:
        raise ConfigError("a name and a key are needed: NAME KEY")
    name, key, *options = words
    if not _NAME.fullmatch(name):
        raise ConfigError("the name: 1 to 64 letters, digits, dots, underscores and dashes are needed")
    if len(key) > _LONGEST_KEY:
        raise ConfigError(f"the key has more than {_LONGEST_KEY} characters")
    admin, rate, quota = False, None, None
    for option in options:
        field_name, _, value = option.partition("=")
        if option == "admin":
            admin = True
        elif field_name == "prompts_per_second":
            rate = _number(field_name, value)
        elif field_name == "file_bytes":
            quota = int(_number(field_name, value, _UNITS))
        else:
            raise ConfigError("after name and key only admin, prompts_per_second=N and file_bytes=SIZE may stand")
    return key, Caller(name, admin, rate, quota)


def _number(name: str, text: str, units: Mapping[str, int] | None = None) -> float:
    """A number above 0 with one of the units behind it."""
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([A-Za-z]{0,3})", text)
    unit = (units or {"": 1}).get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ConfigError(f"{name}: a number above 0 is needed")
    return float(found[1]) * unit
