"""Who may call which endpoint."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from asyncep_router.keys import NOBODY, Caller, Keys
from asyncep_sgl.front.access import AccessGate, Policy, is_local
from asyncep_sgl.front.asgi import Refusal
from asyncep_sgl.front.endpoints import ENDPOINTS, INFERENCE, Access, endpoint_of, rule_of
from asyncep_sgl.front.passage import caller, in_batch

CLIENT, BOSS = "Bearer client", "Bearer boss"
_KEYS = {
    "none": Keys(),
    "client": Keys.of("client"),
    "admin": Keys.of(None, "boss"),
    "both": Keys.of("client", "boss"),
}
_SENT = {"nothing": None, "wrong": "Bearer other", "client": CLIENT, "admin": BOSS}


def _expected(access: Access, keys: str, sent: str, *, local: bool, decodes: bool) -> int:
    """The table of docs/use/security.md, written down once more."""
    is_admin = sent == "admin" and keys in ("admin", "both")
    is_client = sent == "client" and keys in ("client", "both")
    match access:
        case Access.OPEN:
            return 200
        case Access.NEVER:
            return 403
        case Access.DECODING if not decodes:
            return 403
        case Access.CLIENT | Access.DECODING:
            return 200 if keys in ("none", "admin") or is_client or is_admin else 401
        case Access.OPERATOR if keys == "none":
            return 200 if local else 403
    if is_admin:
        return 200
    return 401 if keys in ("admin", "both") and not is_client else 403


def _status(policy: Policy, path: str, authorization: str | None, *, local: bool) -> int:
    try:
        policy.admit(path, authorization, local=local)
    except Refusal as refusal:
        return refusal.status
    return 200


@pytest.mark.parametrize(("keys", "sent"), itertools.product(_KEYS, _SENT))
def test_every_endpoint_with_every_key(keys: str, sent: str) -> None:
    for path, rule in ENDPOINTS.items():
        for local, decodes in itertools.product((False, True), repeat=2):
            policy = Policy(_KEYS[keys], decodes)
            status = _status(policy, path.replace("{}", "x"), _SENT[sent], local=local)
            assert status == _expected(rule.access, keys, sent, local=local, decodes=decodes), (path, local, decodes)


def test_what_is_not_listed_is_not_there() -> None:
    with pytest.raises(Refusal) as refused:
        Policy(Keys()).admit("/debug/everything", None, local=True)
    assert refused.value.status == 404
    assert rule_of("/generate/") is rule_of("/generate")
    assert rule_of("/v1/models/a/b") is not None
    assert rule_of("/v1/files/a/b") is None


def test_every_endpoint_of_sglang_is_decided_on() -> None:
    from sglang.srt.entrypoints.http_server import app

    def paths(routes: Any) -> set[str]:
        found: set[str] = set()
        for route in routes:
            inner = getattr(route, "original_router", None)
            found |= paths(inner.routes) if inner is not None else {endpoint_of(route.path)}
        return found

    ours = {
        "/asyncep/status", "/router/state", "/metrics", "/v1/files", "/v1/files/{}", "/v1/files/{}/content",
        "/v1/batches", "/v1/batches/{}", "/v1/batches/{}/cancel",
    }  # fmt: skip
    assert paths(app.routes) - set(ENDPOINTS) == set()
    unknown = set(ENDPOINTS) - paths(app.routes) - ours - {"/", "/dumper/{}"}
    assert unknown == set()
    for route in app.routes:
        # A new endpoint that takes a body reads a prompt until somebody has decided otherwise.
        path = endpoint_of(getattr(route, "path", "/v1/loads"))
        reads = "POST" in (getattr(route, "methods", None) or ()) and ENDPOINTS[path].access is Access.CLIENT
        assert not reads or path in INFERENCE or path == "/abort_request"


@pytest.mark.parametrize(
    ("client", "headers", "local"),
    [
        (("127.0.0.1", 5), [], True),
        (("127.8.0.1", 5), [], True),
        (("::1", 5), [], True),
        (None, [], True),
        (("10.0.0.2", 5), [], False),
        (("::ffff:10.0.0.2", 5), [], False),
        (("testclient", 5), [], False),
        (("127.0.0.1", 5), [(b"origin", b"http://127.0.0.1")], False),
        (("127.0.0.1", 5), [(b"sec-fetch-site", b"cross-site")], False),
        (("127.0.0.1", 5), [(b"x-forwarded-for", b"10.0.0.2")], False),
        (("127.0.0.1", 5), [(b"forwarded", b"for=10.0.0.2")], False),
    ],
)
def test_who_is_at_this_machine(client: Any, headers: Any, local: bool) -> None:
    assert is_local({"client": client, "headers": headers}) is local


async def _through(gate_policy: Policy, scope: dict[str, Any]) -> tuple[list[Any], list[Caller]]:
    sent: list[Any] = []
    seen: list[Caller] = []

    async def app(*_: Any) -> None:
        seen.append(caller.get())

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    await AccessGate(app, gate_policy)(scope, receive, send)
    return sent, seen


def _scope(path: str, authorization: str | None = None, **more: Any) -> dict[str, Any]:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    return {"type": "http", "method": "POST", "path": path, "headers": headers, "client": ("10.0.0.2", 5), **more}


def test_the_gate_names_the_caller() -> None:
    policy = Policy(_KEYS["both"])
    _, seen = asyncio.run(_through(policy, _scope("/generate", CLIENT)))
    assert seen == [Caller("default")]
    assert caller.get() == NOBODY
    sent, seen = asyncio.run(_through(policy, _scope("/generate")))
    assert not seen
    assert sent[0]["status"] == 401
    assert (b"www-authenticate", b"Bearer") in sent[0]["headers"]
    _, seen = asyncio.run(_through(policy, _scope("/flush_cache", f"bearer {policy.internal}")))
    assert [who.admin for who in seen] == [True]


def test_a_batchs_requests_come_from_inside() -> None:
    async def run() -> list[Caller]:
        in_batch.set(True)
        caller.set(Caller("ann"))
        return (await _through(Policy(_KEYS["both"]), _scope("/generate")))[1]

    assert asyncio.run(run()) == [Caller("ann")]


def test_websockets_are_closed() -> None:
    sent, seen = asyncio.run(_through(Policy(Keys()), {"type": "websocket", "path": "/v1/realtime", "headers": []}))
    assert not seen
    assert sent[0]["type"] == "websocket.close"
