"""Who may do what: an ASGI middleware that asks for keys and keeps control endpoints shut.

Every HTTP request passes here first. It leaves with its caller known (`caller`) or is answered with 401, 403 or 404.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncep_router.keys import NOBODY, Caller, Keys
from asyncep_sgl.front.asgi import Refusal, header, refuse
from asyncep_sgl.front.endpoints import Access, rule_of
from asyncep_sgl.front.passage import caller, in_batch

_SERVER = Caller("asyncep", admin=True)


@dataclass(frozen=True)
class Policy:
    """Who may do what.

    Attributes:
        keys: of the server.
        decodes: whether requests that decode are served.
        internal: the key with which the server asks itself; made anew at each start.
    """

    keys: Keys
    decodes: bool = False
    internal: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    def admit(self, path: str, authorization: str | None, *, local: bool) -> Caller:
        """The caller of a request.

        Args:
            path: of the request.
            authorization: its header, or None.
            local: it comes from a program of this machine, and not through a browser.

        Raises:
            Refusal: 401 without a key that is needed, 403 where the caller may not, 404 for what is not there.
        """
        rule = rule_of(path)
        if rule is None:
            raise Refusal(404, f"{path[:200]}: there is no such endpoint; /openapi.json lists those there are")
        if rule.access is Access.NEVER:
            raise Refusal(403, f"{path}: not served here: {rule.reason}")
        if rule.access is Access.DECODING and not self.decodes:
            raise Refusal(403, f"{path}: this server is prefill-only; start it with --asyncep-decode allow")
        holder = self._inside.holder(authorization) or self.keys.holder(authorization)
        if rule.access is Access.OPEN:
            return holder or NOBODY
        if rule.access in (Access.CLIENT, Access.DECODING):
            if holder is None and self.keys.clients:
                raise Refusal(
                    401,
                    "Authorization: a key of this server is needed, as in 'Authorization: Bearer KEY'",
                    {"www-authenticate": "Bearer"},
                )
            return holder or NOBODY
        return self._control(path, rule.access, holder, local=local)

    @property
    def _inside(self) -> Keys:
        return Keys({self.internal: _SERVER})

    def _control(self, path: str, access: Access, holder: Caller | None, *, local: bool) -> Caller:
        if holder is not None and holder.admin:
            return holder
        if self.keys.admin:
            if holder is None:
                raise Refusal(401, f"{path}: needs the key of --admin-api-key", {"www-authenticate": "Bearer"})
            raise Refusal(403, f"{path}: needs the key of --admin-api-key; yours is a client's")
        if self.keys:
            raise Refusal(403, f"{path}: only with an administrator's key; start the server with --admin-api-key")
        if access is Access.OPERATOR and local:
            return NOBODY
        where = " from another machine or a browser" if access is Access.OPERATOR else ""
        raise Refusal(403, f"{path}: closed{where} while the server has no keys; start it with --admin-api-key")


def is_local(scope: Scope) -> bool:
    """Whether a request was sent by a program of this machine. Pages in a browser name themselves in a header."""
    if header(scope, b"origin") is not None or header(scope, b"sec-fetch-site") is not None:
        return False
    if header(scope, b"x-forwarded-for") is not None or header(scope, b"forwarded") is not None:
        return False
    client = scope.get("client")
    if client is None:
        return True
    try:
        return ipaddress.ip_address(client[0].partition("%")[0]).is_loopback
    except ValueError:
        return False


@dataclass
class AccessGate:
    """ASGI middleware: admits requests as `Policy` says. Requests of a batch come from inside, in its owner's name."""

    app: ASGIApp
    policy: Policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or in_batch.get():
            await self.app(scope, receive, send)
            return
        try:
            # A cross-origin question before a request; whether the answer allows anything is the CORS middleware's.
            if scope["method"] == "OPTIONS":
                who = NOBODY
            else:
                who = self.policy.admit(scope["path"], header(scope, b"authorization"), local=is_local(scope))
        except Refusal as refusal:
            await refuse(send, refusal)
            return
        token = caller.set(who)
        try:
            await self.app(scope, receive, send)
        finally:
            caller.reset(token)
