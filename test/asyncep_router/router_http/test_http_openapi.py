"""The document of the endpoints says what is served: no more, no less."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from asyncep_router.http.admin import Admin
from asyncep_router.http.openapi import document
from asyncep_router.http.routes import ROUTES, Route, find
from router_http.harness import NullWorker, RouterProcess

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE")
# What SGLang's server or its router offers and this router does not.
CONTROL = [
    "/start_profile",
    "/stop_profile",
    "/pause_generation",
    "/continue_generation",
    "/update_weights_from_disk",
    "/release_memory_occupation",
    "/open_session",
    "/load_lora_adapter",
    "/configure_logging",
    "/set_internal_state",
    "/freeze_gc",
    "/metrics",
    "/docs",
    "/v1/files",
    "/v1/batches",
    "/ha/status",
    "/",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    worker = NullWorker()
    process = RouterProcess(worker.url, log=tmp_path_factory.mktemp("openapi") / "log")
    try:
        yield process.ready(1)
    finally:
        process.stop()
        worker.stop()


def test_the_document_has_every_route_once() -> None:
    paths = document(keyed=True)["paths"]
    assert {(method.upper(), path) for path, found in paths.items() for method in found} == {
        (route.method, route.path) for route in ROUTES
    }
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    operations = [operation for found in paths.values() for operation in found.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)
    keyed = {name for name, operation in zip(names, operations, strict=True) if "security" in operation}
    assert "get_health" not in keyed
    assert "post_generate" in keyed
    for route in ROUTES:
        assert route.infers or hasattr(Admin, f"_{route.handler}")


def test_what_is_documented_is_served(served: RouterProcess) -> None:
    paths = served.get("/openapi.json").json()["paths"]
    for path, found in paths.items():
        for method in METHODS:
            url = served.url + path.replace("{id}", "nobody")
            answer = httpx.request(method, url, json={} if method in ("POST", "PUT", "PATCH") else None, timeout=60)
            if method.lower() in found:
                assert answer.status_code != 405, (method, path)
                if answer.status_code == 404:
                    assert "no worker 'nobody'" in answer.text or "no endpoint" not in answer.text
            else:
                assert answer.status_code == 405, (method, path)
                assert answer.headers["allow"] == ", ".join(sorted(name.upper() for name in found))


@pytest.mark.parametrize("path", CONTROL)
def test_what_is_not_documented_is_not_there(served: RouterProcess, path: str) -> None:
    for method in ("GET", "POST"):
        answer = httpx.request(method, served.url + path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_paths_are_found() -> None:
    assert isinstance(find("GET", "/workers"), Route)
    found = find("DELETE", "/workers/http://a:1")
    assert isinstance(found, Route)
    assert found.handler == "remove"
    assert find("POST", "/workers/x") == ("DELETE", "GET", "PUT")
    assert find("POST", "/workers/") == ()
