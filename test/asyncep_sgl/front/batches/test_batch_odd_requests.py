"""The Batch API over HTTP: no request makes it fail, whatever is in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_api import Api, Test, api, rows

Shared = Callable[[Test], None]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Runs many small tests on one application."""
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        client = runner.run(stack.enter_async_context(api(tmp_path_factory.mktemp("shared"))))
        yield lambda test: runner.run(test(client))
        runner.run(stack.aclose())


ODD = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["9" * 5000, "-1", "0", "1.0", "²", "٣", "1e9", "\0", "a\nb", "%00", "'; DROP TABLE files; --"]),
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(queries=st.lists(st.tuples(st.sampled_from(["after", "limit", "order", "purpose"]), ODD), max_size=4), path=ODD)
@example(queries=[("limit", "9" * 5000)], path="x")
@example(queries=[("after", "\0")], path="..")
def test_no_query_is_a_server_error(shared: Shared, queries: list[tuple[str, str]], path: str) -> None:
    async def test(client: Api) -> None:
        for kind in ("files", "batches"):
            answer = await client.call("GET", f"/v1/{kind}", params=queries)
            assert answer.status_code < 500, answer.text
            for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel")):
                name = quote(path, safe="") or "-"
                answer = await client.call(method, f"/v1/{kind}/{name}{end}")
                assert 400 <= answer.status_code < 500, answer.text

    shared(test)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"])
        | st.text(max_size=10),
        VALUE,
        max_size=6,
    )
)
def test_no_order_is_a_server_error(shared: Shared, change: dict[str, Any]) -> None:
    async def test(client: Api) -> None:
        order = {"input_file_id": "file-x", "endpoint": "/v1/score", "completion_window": "24h", **change}
        answer = await client.call("POST", "/v1/batches", json=order)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["message"]

    shared(test)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"7", b"\xff", b'{"input_file_id": "\\ud800"}', b"[" * 5000, b"x" * (2 << 20)],
    ids=lambda body: str(body[:12]),
)
def test_no_body_is_a_server_error(shared: Shared, body: bytes) -> None:
    async def test(client: Api) -> None:
        answer = await client.call("POST", "/v1/batches", content=body)
        assert 400 <= answer.status_code < 500, answer.text

    shared(test)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=60).filter(lambda name: not set(name) & set(b'"\\\r\n')))
@example('ü"\\'.encode().replace(b'"', b"").replace(b"\\", b""))
@example(b"\xff\xfe")
@example(b"../../etc/passwd")
@example(b"a; filename=b")
def test_files_of_any_name(shared: Shared, name: bytes) -> None:
    async def test(client: Api) -> None:
        body = (
            b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\nxyz\r\n--b--\r\n'
        )
        headers = {"content-type": "multipart/form-data; boundary=b"}
        answer = await client.client.post("/v1/files", content=body, headers=headers)
        assert answer.status_code in (200, 400), answer.text
        if answer.status_code == 200:
            file = answer.json()["id"]
            content = await client.call("GET", f"/v1/files/{file}/content")
            assert (content.status_code, content.content) == (200, b"xyz")
            assert (await client.call("GET", "/v1/files")).json()["data"][0]["filename"] == answer.json()["filename"]

    shared(test)


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 400),
        ("multipart/form-data", b"", 400),
        ("multipart/form-data; boundary=" + "b" * 5000, b"", 400),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"nonsense", 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nx',
            400,
        ),
        ("multipart/form-data; boundary=b", b"--b\r\nno-name: 1\r\n\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"h: 1\r\n" * 1000 + b"\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nh: " + b"1" * 100_000 + b"\r\n\r\nx\r\n--b--\r\n", 400),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + b"x" * 100_000 + b"\r\n--b--\r\n",
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="a"\r\n\r\n1\r\n' * 100 + b"--b--\r\n",
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n1\r\n' * 2 + b"--b--\r\n",
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="file"; filename="' + b"x" * 300 + b'"\r\n\r\n1\r\n--b--\r\n',
            400,
        ),
    ],
)
def test_forms_that_are_none(shared: Shared, content_type: str, body: bytes, status: int) -> None:
    async def test(client: Api) -> None:
        answer = await client.client.post("/v1/files", content=body, headers={"content-type": content_type})
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
        assert not [path for path in (client.folder / "files").iterdir() if path.suffix == ".tmp"]
        ledger = client.batches._opened[0].ledger  # type: ignore[index]
        # Nothing of it is counted.
        files = [path.stat().st_size for path in (client.folder / "files").iterdir()]
        assert (ledger.files.total(), ledger.used.total()) == (len(files), sum(files))

    shared(test)


def test_a_line_that_is_too_long_is_named(shared: Shared) -> None:
    async def test(client: Api) -> None:
        long = json.dumps({"custom_id": "x", "url": "/v1/score", "body": {"row": 1, "text": "x" * (17 << 20)}})
        batch = await client.until((await client.order(rows(1) + long.encode() + b"\n" + rows(1, first=1)))["id"])
        assert batch["status"] == "failed"
        assert [(error["code"], error["line"]) for error in batch["errors"]["data"]] == [("line_too_long", 2)]

    shared(test)
