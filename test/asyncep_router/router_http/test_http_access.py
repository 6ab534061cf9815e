"""Keys: who may do what, and where no key ever goes. The rules, and the router's process with its workers."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncep_router.errors import ConfigError
from asyncep_router.http.access import Access, Right, loopback
from asyncep_router.http.errors import Forbidden, Refusal, Unauthorized
from asyncep_router.http.flags import parse
from asyncep_router.http.public import public, public_name
from asyncep_router.http.routes import ROUTES
from asyncep_router.http.worker_urls import normalize, worker_key
from asyncep_router.keys import Keys
from asyncep_router.launch_server import parse as parse_launch
from asyncep_router.process_title import masked
from router_http.harness import NullWorker, RouterProcess, wait_for

Workers = Callable[..., NullWorker]
Routers = Callable[..., RouterProcess]

CLIENT, ADMIN, WORKER = "client-key-123", "admin-key-456", "worker-key-789"
ALL_KEYS = (CLIENT, ADMIN, WORKER)


# The rules


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("keys", "right", "key", "peer", "outcome"),
    [
        (Keys.of(), Right.CLIENT, None, "10.0.0.1", None),
        (Keys.of(), Right.CLIENT, "whatever", "10.0.0.1", None),
        (Keys.of(), Right.ADMIN, None, "127.0.0.1", None),
        (Keys.of(), Right.ADMIN, None, "::1", None),
        (Keys.of(), Right.ADMIN, None, "::ffff:127.0.0.1", None),
        (Keys.of(), Right.ADMIN, None, "10.0.0.1", Forbidden),
        (Keys.of(), Right.ADMIN, None, None, Forbidden),
        (Keys.of(CLIENT), Right.CLIENT, None, "127.0.0.1", Unauthorized),
        (Keys.of(CLIENT), Right.CLIENT, ADMIN, "127.0.0.1", Unauthorized),
        (Keys.of(CLIENT), Right.CLIENT, CLIENT, "10.0.0.1", None),
        (Keys.of(CLIENT), Right.ADMIN, CLIENT, "127.0.0.1", Forbidden),
        (Keys.of(CLIENT), Right.ADMIN, None, "127.0.0.1", Unauthorized),
        (Keys.of(CLIENT, ADMIN), Right.ADMIN, CLIENT, "127.0.0.1", Forbidden),
        (Keys.of(CLIENT, ADMIN), Right.ADMIN, None, "127.0.0.1", Unauthorized),
        (Keys.of(CLIENT, ADMIN), Right.ADMIN, ADMIN, "10.0.0.1", None),
        (Keys.of(CLIENT, ADMIN), Right.CLIENT, ADMIN, "10.0.0.1", None),
        (Keys.of(None, ADMIN), Right.CLIENT, None, "10.0.0.1", None),
        (Keys.of(None, ADMIN), Right.ADMIN, None, "127.0.0.1", Unauthorized),
        (Keys.of(CLIENT, ADMIN), Right.OPEN, None, "10.0.0.1", None),
    ],
)
def test_rights(keys: Keys, right: Right, key: str | None, peer: str | None, outcome: type[Refusal] | None) -> None:
    access = Access(keys)
    if outcome is None:
        access.check(right, bearer(key), peer)
        return
    with pytest.raises(outcome) as refusal:
        access.check(right, bearer(key), peer)
    assert "admin" not in refusal.value.code
    if right is Right.ADMIN and outcome is Forbidden:
        assert "--admin-api-key" in str(refusal.value)


@pytest.mark.parametrize("name", ["Origin", "X-Forwarded-For", "Forwarded", "Sec-Fetch-Site", "Via", "X-Real-IP"])
def test_without_keys_a_page_or_a_proxy_is_nobody_of_this_machine(name: str) -> None:
    with pytest.raises(Forbidden):
        Access(Keys.of()).check(Right.ADMIN, {name: "x"}, "127.0.0.1")


@given(st.ip_addresses())
def test_loopback_is_loopback(address: Any) -> None:
    mapped = getattr(address, "ipv4_mapped", None) or address
    assert loopback(str(address)) == mapped.is_loopback


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host:1",
        "file:///etc/passwd",
        "http://",
        "http://user:pa55@host:1",
        "http://user@host:1",
        "http://host:99999",
        "http://host:0",
        "http://host:x",
        "http://host:1?a=b",
        "http://host:1#a",
        "http://ho st:1",
        "http://host:1/\r\nX: y",
        "http://[::1",
        "javascript:alert(1)",
        "http://h" + "o" * 5000,
        "",
    ],
)
def test_urls_that_are_no_workers(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        normalize(url)
    assert "pa55" not in str(error.value)


def test_urls_of_workers_are_compared_in_one_form() -> None:
    assert normalize(" Host:30000/ ") == normalize("http://host:30000") == "http://host:30000"
    assert normalize("https://[::1]:8000/base/") == "https://[::1]:8000/base"


@given(st.text(max_size=60))
def test_a_url_is_normalized_or_refused(url: str) -> None:
    try:
        found = normalize(url)
    except ConfigError:
        return
    assert normalize(found) == found
    assert "@" not in found.split("/")[2]


@pytest.mark.parametrize("key", [5, "", "a b", "a\nb", "ä", "x" * 600, ["a"], True])
def test_keys_that_no_header_can_carry(key: Any) -> None:
    with pytest.raises(ConfigError, match="api_key"):
        worker_key(key)


NAMES = st.sampled_from(
    ["api_key", "admin_api_key", "apiKey", "hf_token", "auth_token", "ssl_keyfile_password", "client_secret", "Cookie"]
)


@given(st.recursive(st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner), max_leaves=8))
def test_fields_that_speak_of_keys_are_left_out(value: Any) -> None:
    assert public({"deep": [{"api_key": "s", "x": value}]})["deep"] == [{"x": public(value)}]
    text = json.dumps(public({"hf_token": ["x", value], "password": value, "secret_thing": [value]}))
    assert text == "{}"


def test_what_clients_need_stays() -> None:
    info = {
        "max_total_num_tokens": 5,
        "chunked_prefill_size": 2,
        "max_req_input_len": 9,
        "token_ids": [1, 2],
        "tokenizer_mode": "auto",
        "model_path": "/srv/models/tiny",
        "served_model_name": "org/model",
        "note": f"started with {CLIENT}",
    }
    shown = public(info, [CLIENT])
    assert shown == {**info, "model_path": "tiny", "note": "(hidden)"}
    assert public(info, [CLIENT], paths=True)["model_path"] == "/srv/models/tiny"
    assert public_name("C:\\models\\x") == "x"


def test_command_lines_are_masked() -> None:
    line = ["--api-key", "s1", "--admin-api-key=s2", "--port", "1", "--api-key", "@file", "--worker-api-key=@f"]
    assert masked(line, ["--api-key", "--admin-api-key", "--worker-api-key"]) == [
        *("--api-key", "***", "--admin-api-key=***", "--port", "1", "--api-key", "@file", "--worker-api-key=@f")
    ]


def test_keys_of_flags_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\nanything")
    monkeypatch.setenv("ASYNCEP_ROUTER_ADMIN_API_KEY", "from-environment")
    options = parse(["--api-key", f"@{file}"])
    assert (options.api_key, options.admin_api_key) == ("from-file", "from-environment")
    assert options.key_for_workers == "from-file"
    assert "from-" not in repr(options)
    assert parse(["--worker-api-key", "w"]).key_for_workers == "w"
    with pytest.raises(ConfigError, match="key"):
        parse(["--worker-api-key", "a b"])


def test_servers_of_launch_server_get_their_keys_by_environment(tmp_path: Path) -> None:
    options = parse_launch(["--model-path", "m", "--api-key", CLIENT, "--admin-api-key", ADMIN])
    assert CLIENT not in str(options.commands)
    assert options.environment == {"ASYNCEP_API_KEY": CLIENT, "ASYNCEP_ADMIN_API_KEY": ADMIN}
    assert (options.router.api_key, options.router.key_for_workers) == (CLIENT, CLIENT)
    assert options.router.worker_admin_api_key == ADMIN
    assert CLIENT not in repr(options)
    file = tmp_path / "keys"
    file.write_text("one k1\ntwo k2\n")
    file.chmod(0o600)
    several = parse_launch(["--model-path", "m", "--api-key-file", str(file)])
    assert set(several.router.keys.holders) == {"k1", "k2"}
    # The servers know the router by a key of its own.
    assert several.environment == {"ASYNCEP_API_KEY": several.router.key_for_workers}
    assert several.router.key_for_workers not in {None, "k1", "k2"}
    stock = parse_launch(["--model-path", "m", "--router-worker-command", "sglang", "--api-key", CLIENT])
    assert CLIENT in stock.commands[0]


# The process


class Guarded(NamedTuple):
    worker: NullWorker
    router: RouterProcess


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A router with a client's and an administrator's key before a worker with another."""
    worker = NullWorker(flags=f"--api-key {WORKER}")
    folder = tmp_path_factory.mktemp("access")
    (folder / "worker").write_text(WORKER)
    flags = f"--api-key {CLIENT} --worker-api-key @{folder / 'worker'} --log-level debug --log-decisions"
    environment = {"ASYNCEP_ROUTER_ADMIN_API_KEY": ADMIN}
    router = RouterProcess(worker.url, flags=flags, log=folder / "log", environment=environment)
    router.key = CLIENT
    try:
        yield Guarded(worker, router.ready(1))
    finally:
        router.stop()
        worker.stop()


def every_route() -> list[tuple[str, str, Right]]:
    return [(route.method, route.path.replace("{id}", "nobody"), route.right) for route in ROUTES]


@pytest.mark.parametrize(("method", "path", "right"), every_route())
def test_every_route_asks_for_its_key(guarded: Guarded, method: str, path: str, right: Right) -> None:
    url = guarded.router.url + path
    for key, expected in ((None, 401), ("wrong", 401), (CLIENT, 403 if right is Right.ADMIN else None)):
        if right is Right.OPEN:
            expected = None
        answer = httpx.request(method, url, headers=bearer(key), timeout=30)
        if expected is None:
            assert answer.status_code not in (401, 403)
        else:
            assert answer.status_code == expected, answer.text
            assert answer.json()["error"]["message"]
        assert not any(secret in answer.text for secret in ALL_KEYS)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer", "bEaReR"])
def test_the_scheme_in_any_case(guarded: Guarded, scheme: str) -> None:
    answer = httpx.get(guarded.router.url + "/workers", headers={"Authorization": f"{scheme} {CLIENT}"})
    assert answer.status_code == 200


def test_no_key_and_no_path_in_what_is_told(guarded: Guarded) -> None:
    router = guarded.router
    told = ["/server_info", "/get_server_info", "/model_info", "/v1/models", "/router/state", "/workers", "/get_loads"]
    told += ["/workers/" + router.state()["workers"][0]["id"], "/list_workers", "/openapi.json", "/nowhere"]
    for path in told:
        for key in (CLIENT, ADMIN):
            text = router.get(path, key).text
            assert not any(secret in text for secret in (*ALL_KEYS, "the-admin-key", "hf_abc")), path
        assert "/srv/" not in router.get(path, CLIENT).text
    assert router.get("/server_info").json()["dp_size"] == 1
    assert router.get("/server_info").json()["tokenizer_path"] == "null"
    assert router.get("/server_info", ADMIN).json()["tokenizer_path"] == "/srv/models/null"


def test_no_key_in_log_ps_or_metrics(guarded: Guarded) -> None:
    router = guarded.router
    router.post("/generate", {"input_ids": [1]}, headers=bearer(CLIENT))
    router.post("/workers", {"url": f"http://x:{WORKER}@127.0.0.1:1"}, headers=bearer(ADMIN))
    metrics = httpx.get(f"http://127.0.0.1:{router.metrics_port}/metrics").text
    line = " ".join(psutil.Process(router.process.pid).cmdline())
    assert "--api-key ***" in line
    for text in (router.log.read_text(), line, metrics):
        assert not any(secret in text for secret in ALL_KEYS)


def test_a_clients_headers_stay_here(guarded: Guarded) -> None:
    sent = {
        **bearer(CLIENT),
        "Cookie": "session=1",
        "X-Api-Key": CLIENT,
        "Proxy-Authorization": "Basic eDp5",
        "X-Data-Parallel-Rank": "7",
        "traceparent": "00-1-2-01",
    }
    assert guarded.router.post("/generate", {"input_ids": [1]}, headers=sent).status_code == 200
    counts = guarded.worker.counts
    assert CLIENT not in counts["keys"]
    assert ADMIN not in counts["keys"]
    assert "traceparent" in counts["headers"]
    assert not {"cookie", "x-api-key", "proxy-authorization", "x-data-parallel-rank"} & set(counts["headers"])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"url": 5},
        {"url": "ftp://x"},
        {"url": "http://a:b@127.0.0.1:1"},
        {"url": "http://127.0.0.1:1", "api_key": 5},
        {"url": "http://127.0.0.1:1", "api_key": "a b"},
        {"url": "http://127.0.0.1:1", "labels": [1]},
        {"url": "http://127.0.0.1:1", "labels": {"a": "b" * 1000}},
    ],
    ids=str,
)
def test_what_is_no_worker_is_refused(guarded: Guarded, fields: dict[str, Any]) -> None:
    answer = guarded.router.post("/workers", fields, headers=bearer(ADMIN))
    assert answer.status_code == 400, answer.text
    assert len(guarded.router.state()["workers"]) == 1


def test_a_worker_that_joins_gets_no_key_that_is_not_its_own(
    null_worker: Workers, router: Routers, tmp_path: Path
) -> None:
    """A stranger's address, added by whoever holds the administrator's key, learns nothing of the router's keys."""
    own = null_worker(flags=f"--api-key {WORKER}")
    stranger, keyed, trusted = null_worker(), null_worker(flags="--api-key its-own-key"), null_worker()
    flags = f"--api-key {CLIENT} --admin-api-key {ADMIN} --worker-api-key {WORKER}"
    process = router(own.url, flags=f"{flags} --trusted-worker-urls {trusted.url} --policy round_robin")
    process.key = CLIENT
    process.ready(1)
    for worker, more in ((stranger, {}), (keyed, {"api_key": "its-own-key"}), (trusted, {})):
        assert process.post("/workers", {"url": worker.url, **more}, headers=bearer(CLIENT)).status_code == 403
        assert process.post("/workers", {"url": worker.url, **more}, headers=bearer(ADMIN)).status_code == 202
    process.ready(4)
    for number in range(12):
        assert process.post("/generate", {"input_ids": [number]}, headers=bearer(CLIENT)).status_code == 200
    assert set(stranger.counts["keys"]) == {""}
    # Each was asked without a key first.
    for worker, key in ((own, WORKER), (keyed, "its-own-key"), (trusted, WORKER)):
        assert set(worker.counts["keys"]) == {"", key}
    # What is no server of SGLang's kind is sent no key at all.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    added = {"url": f"http://127.0.0.1:{port}", "api_key": "meant-for-another"}
    assert process.post("/workers", added, headers=bearer(ADMIN)).status_code == 202
    for _ in range(3):
        connection, _ = listener.accept()
        with connection:
            assert b"uthorization" not in connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
    listener.close()


def test_a_worker_that_wants_another_key_is_no_clients_fault(null_worker: Workers, router: Routers) -> None:
    worker = null_worker()
    process = router(worker.url, flags="--retry-max-retries 1 --retry-max-backoff-ms 1").ready(1)
    worker.tell("mode", "401")
    answer = process.post("/generate", {"input_ids": [1]})
    assert (answer.status_code, "--worker-api-key" in answer.text) == (502, True)


def test_priorities_above_normal_are_the_administrators(guarded: Guarded) -> None:
    body = {"input_ids": [1], "priority": 9}
    answer = guarded.router.post("/generate", body, headers=bearer(CLIENT))
    assert (answer.status_code, "priority" in answer.text) == (403, True)
    assert guarded.router.post("/generate", body, headers=bearer(ADMIN)).status_code == 200
    assert guarded.router.post("/generate", {**body, "priority": -1}, headers=bearer(CLIENT)).status_code == 200


def test_several_clients_each_at_its_rate(null_worker: Workers, router: Routers, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("slow slow-key prompts_per_second=0.1\nquick quick-key\nboss boss-key admin\n")
    file.chmod(0o600)
    process = router(null_worker().url, flags=f"--api-key-file {file}")
    process.key = "quick-key"
    process.ready(1)
    many = {"input_ids": [[number] for number in range(20)]}
    assert process.post("/generate", many, headers=bearer("slow-key")).status_code == 200  # into debt
    refused = process.post("/generate", {"input_ids": [1]}, headers=bearer("slow-key"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) > 0
    assert process.post("/generate", many, headers=bearer("quick-key")).status_code == 200
    assert process.post("/flush_cache", {}, headers=bearer("quick-key")).status_code == 403
    assert process.post("/flush_cache", {}, headers=bearer("boss-key")).status_code == 200


def test_nothing_listens_beyond_its_host(guarded: Guarded) -> None:
    def listening() -> set[str]:
        found = psutil.Process(guarded.router.process.pid).net_connections("inet")
        return {entry.laddr.ip for entry in found if entry.status == psutil.CONN_LISTEN}

    wait_for(lambda: bool(listening()), "listening")
    assert listening() == {"127.0.0.1"}


def test_browsers_are_not_let_in_by_default(guarded: Guarded, null_worker: Workers, router: Routers) -> None:
    asked = {"Origin": "http://evil", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "GET", "POST"):
        answer = httpx.request(method, guarded.router.url + "/health", headers=asked)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    everyone = router(null_worker().url, flags="--cors-allowed-origins *").ready(1)
    answer = httpx.request("OPTIONS", everyone.url + "/generate", headers=asked)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    # A page must not administrate a router without keys through its visitor's browser.
    assert everyone.post("/flush_cache", {}, headers={"Origin": "http://evil"}).status_code == 403
    assert everyone.post("/flush_cache", {}).status_code == 200
