"""Who may do what: rights of endpoints, and whether a request has them. Pure."""

from __future__ import annotations

import ipaddress
from enum import Enum
from typing import TYPE_CHECKING

from asyncep_router.http.errors import Forbidden, Unauthorized
from asyncep_router.keys import NOBODY, Caller

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncep_router.keys import Keys

# A request with one of these came through a proxy or from a web page: that its connection comes from this machine
# says nothing about who sent it.
_FROM_ELSEWHERE = ("Origin", "Forwarded", "X-Forwarded-For", "X-Real-IP", "Via", "Sec-Fetch-Site")


class Right(Enum):
    """What an endpoint asks of its caller."""

    OPEN = "open"
    """Nothing."""
    CLIENT = "client"
    """A key, if any client has one."""
    ADMIN = "admin"
    """The administrator's key; without any keys, a connection from this machine."""


class Access:
    """Checks requests against the router's keys."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    def check(self, right: Right, headers: Mapping[str, str], peer: str | None) -> Caller:
        """The caller, if it has the right. `peer`: the address it connects from, None if that is unknown.

        Raises `Unauthorized` (no key, or one that is not known), `Forbidden` (not enough).
        """
        if right is Right.OPEN:
            return NOBODY
        caller = self._keys.holder(headers.get("Authorization")) if self._keys else None
        if right is Right.CLIENT:
            if caller is None and self._keys.clients:
                raise Unauthorized("the Authorization header must carry the router's API key: Bearer KEY")
            return caller or NOBODY
        if caller is not None and caller.admin:
            return caller
        if self._keys.admin:
            if caller is None:
                raise Unauthorized("the Authorization header must carry the administrator's key: Bearer KEY")
            raise Forbidden("this needs the administrator's key, the router's --admin-api-key")
        if self._keys:
            if caller is None:
                raise Unauthorized("the Authorization header must carry the administrator's key: Bearer KEY")
            raise Forbidden("this needs an administrator's key; start the router with --admin-api-key")
        if not _local(headers, peer):
            raise Forbidden(
                "without keys this answers only to programs on the router's machine; start it with --admin-api-key"
            )
        return NOBODY

    def administrates(self, headers: Mapping[str, str], peer: str | None) -> bool:
        """Whether the request may do what an administrator may."""
        try:
            self.check(Right.ADMIN, headers, peer)
        except (Unauthorized, Forbidden):
            return False
        return True


def _local(headers: Mapping[str, str], peer: str | None) -> bool:
    return peer is not None and loopback(peer) and not any(name in headers for name in _FROM_ELSEWHERE)


def loopback(address: str) -> bool:
    """Whether it names this machine only."""
    if address.lower() == "localhost":
        return True
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
