"""The official openai client against `asyncep serve`: killed and started again, cancelled, given nonsense."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai.types import Batch
from server import Server, run, wait_ready

from asyncep_sgl.process.ports import free_port

pytestmark = pytest.mark.server

DOCS = Path(__file__).parents[4] / "docs" / "use"
KEY = "secret"
ROWS = 1500
# More than a rank does before the test has gone on.
MANY = 3000


class Host:
    """A server that can be killed and started again with the same command."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port = free_port()
        self.folder = folder
        self._command = ["-m", "asyncep", "serve", "--model-path", str(model), "--port", str(self.port)]
        # In bf16 an answer depends in its last digits on what else was in its batch.
        self._command += [
            "--dtype",
            "float32",
            "--dp-size",
            "2",
            "--api-key",
            KEY,
            "--asyncep-batch-dir",
            str(folder / "batches"),
        ]
        self.server = self._start()
        self.client = openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=KEY, max_retries=0)

    def _start(self) -> Server:
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        server = run([sys.executable, *self._command], f"http://127.0.0.1:{self.port}", log)
        wait_ready(server)
        return server

    def killed_and_started_again(self) -> None:
        processes = self.server.processes()
        self.server.stop(signal.SIGKILL)
        # The others end with the launcher, but not in the same moment, and the port is theirs until then.
        assert not psutil.wait_procs(processes, timeout=30)[1]
        self.server = self._start()

    def rank_pid(self) -> int:
        status = httpx.get(self.server.url + "/asyncep/status", headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        pid: int = status.json()["ranks"][0]["pid"]
        return pid

    def upload(self, rows: list[Any]) -> str:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        file = ("rows.jsonl", io.BytesIO("\n".join(lines).encode()))
        return self.client.files.create(file=file, purpose="batch").id

    def order(self, rows: list[Any], endpoint: str = "/v1/completions", **more: Any) -> Batch:
        options: dict[str, Any] = {"completion_window": "24h", "endpoint": endpoint, **more}
        return self.client.batches.create(input_file_id=self.upload(rows), **options)

    def wait(self, batch: Batch, until: Callable[[Batch], bool] = lambda batch: batch.status in ENDS) -> Batch:
        deadline = time.monotonic() + 240
        # The API has no other way to learn of a batch's end than asking.
        while not until(batch := self.client.batches.retrieve(batch.id)):
            assert batch.status not in ENDS, batch
            assert time.monotonic() < deadline, batch
            time.sleep(0.1)
        return batch

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]


ENDS = ("completed", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def host(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    found = Host(tiny_model("qwen3_moe"), tmp_path_factory.mktemp("host"))
    yield found
    found.server.stop()


def completion(number: int, words: int = 60, **more: Any) -> dict[str, Any]:
    body = {"model": "default", "prompt": f"row {number} " + "word " * words, "max_tokens": 1, "logprobs": 2}
    # By default the new token would be drawn, another one each time.
    body |= {"temperature": 0, **more}
    return {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/completions", "body": body}


def test_a_batch_survives_the_death_of_a_rank_and_of_the_server(host: Host) -> None:
    rows = [completion(number, 240) for number in range(ROWS)]
    rows[17]["body"]["max_tokens"] = 50
    batch = host.order(rows, metadata={"who": "test"})
    half = host.wait(batch, lambda found: found.request_counts is not None and found.request_counts.completed >= 50)
    assert half.status == "in_progress"
    os.kill(host.rank_pid(), signal.SIGKILL)
    # While the rank is away nothing goes on: the server dies in the middle of the batch, however fast the machine is.
    host.killed_and_started_again()
    again = host.client.batches.retrieve(batch.id)
    # What was kept before the kill is not done again.
    assert again.request_counts is not None
    assert half.request_counts is not None
    assert again.request_counts.completed >= half.request_counts.completed
    # Of this server a rank alone dies.
    os.kill(host.rank_pid(), signal.SIGKILL)
    done = host.wait(batch)
    assert done.status == "completed"
    assert done.metadata == {"who": "test"}
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (ROWS, ROWS - 1, 1)
    good, bad = host.lines(done.output_file_id), host.lines(done.error_file_id)
    assert [line["custom_id"] for line in good] == [f"row-{i}" for i in range(ROWS) if i != 17]
    assert [line["custom_id"] for line in bad] == ["row-17"]
    assert bad[0]["response"]["status_code"] == 400
    assert "prefill-only" in json.dumps(bad[0]["response"]["body"])
    # The answers are those that a client gets by itself.
    for number in (0, ROWS // 2, ROWS - 1):
        alone = host.client.completions.create(**rows[number]["body"])
        logs = good[number - (number > 17)]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
        assert alone.choices[0].logprobs is not None
        assert logs == pytest.approx(alone.choices[0].logprobs.token_logprobs, abs=1e-3)


def test_scores_and_generate(host: Host) -> None:
    score = {
        "query": "is it ",
        "items": ["good", "bad"],
        "label_token_ids": [5, 6],
        "model": "m",
        "apply_softmax": True,
    }
    line = {"custom_id": "s", "method": "POST", "url": "/v1/score", "body": score}
    batch = host.wait(host.order([line], "/v1/score"))
    [answer] = host.lines(batch.output_file_id)
    assert [sum(row) for row in answer["response"]["body"]["scores"]] == pytest.approx([1, 1])
    generate = {"text": "a text", "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
    batch = host.wait(host.order([{"custom_id": "g", "url": "/generate", "body": generate}], "/generate"))
    [answer] = host.lines(batch.output_file_id)
    assert answer["response"]["body"]["meta_info"]["prompt_tokens"] > 0


def test_echo_without_new_tokens(host: Host) -> None:
    row = completion(1, echo=True)
    row["body"]["max_tokens"] = 0
    batch = host.wait(host.order([row]))
    [answer] = host.lines(batch.output_file_id)
    logs = answer["response"]["body"]["choices"][0]["logprobs"]
    assert len(logs["token_logprobs"]) == len(logs["tokens"]) > 60


def test_interactive_requests_pass_a_batch(host: Host) -> None:
    batch = host.order([completion(i, 240) for i in range(MANY)])
    host.wait(batch, lambda found: found.status == "in_progress")
    body = completion(9999)["body"]
    for _ in range(3):
        host.client.completions.create(**body)
    counts = host.client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    assert counts.completed < MANY
    host.client.batches.cancel(batch.id)
    done = host.wait(batch)
    assert done.status == "cancelled"
    assert done.cancelling_at is not None
    assert done.request_counts is not None
    assert done.request_counts.completed < MANY
    good = host.lines(done.output_file_id) if done.output_file_id else []
    bad = host.lines(done.error_file_id)
    assert {line["error"]["code"] for line in bad} == {"batch_cancelled"}
    assert sorted(line["custom_id"] for line in good + bad) == sorted(f"row-{i}" for i in range(MANY))
    # Again changes nothing; and what has ended otherwise stays so.
    assert host.client.batches.cancel(batch.id).status == "cancelled"
    done = host.wait(host.order([completion(0)]))
    with pytest.raises(openai.ConflictError, match="is completed and can no longer be cancelled"):
        host.client.batches.cancel(done.id)


def test_a_window_that_is_too_short(host: Host) -> None:
    batch = host.wait(host.order([completion(i, 240) for i in range(MANY)], completion_window="1s"))
    assert batch.status == "expired"
    bad = host.lines(batch.error_file_id)
    assert {line["error"]["code"] for line in bad} == {"batch_expired"}
    good = host.lines(batch.output_file_id) if batch.output_file_id else []
    assert len(good) + len(bad) == MANY


def test_files_and_lists(host: Host) -> None:
    ids = [host.upload([completion(i)]) for i in range(3)]
    listed = [file.id for file in host.client.files.list(limit=2)]  # follows the pages
    assert listed[:3] == ids[::-1]
    assert host.client.files.retrieve(ids[0]).purpose == "batch"
    assert host.client.files.delete(ids[0]).deleted
    with pytest.raises(openai.NotFoundError):
        host.client.files.retrieve(ids[0])
    made = [host.order([completion(i)]) for i in range(4)]
    batches = [batch.id for batch in host.client.batches.list(limit=1)]
    assert len(batches) == len(set(batches))
    assert {batch.id for batch in made} <= set(batches)
    for batch in made:
        assert host.wait(batch).status == "completed"


@pytest.mark.parametrize(
    ("row", "code", "line"),
    [
        ("{broken", "invalid_json_line", 2),
        ([1], "invalid_json_line", 2),
        ({**completion(0), "custom_id": "row-1"}, "duplicate_custom_id", 2),
        ({**completion(0), "url": "/v1/score"}, "mismatched_endpoint", 2),
        ({**completion(0), "method": "GET"}, "invalid_method", 2),
        ({**completion(0), "body": "x"}, "missing_body", 2),
        ({**completion(0), "body": {"stream": True}}, "stream_not_supported", 2),
        ({**completion(0), "custom_id": 7}, "invalid_custom_id", 2),
    ],
)
def test_a_bad_line_fails_the_batch_and_is_named(host: Host, row: Any, code: str, line: int) -> None:
    batch = host.wait(host.order([completion(1), row]))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, line)]


def test_an_empty_file_fails_the_batch(host: Host) -> None:
    batch = host.wait(host.order(["", " "]))
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [error.code for error in batch.errors.data] == ["empty_file"]


def test_bad_orders_are_refused(host: Host) -> None:
    good = host.upload([completion(0)])
    for change, words in (
        ({"input_file_id": "file-none"}, "input_file_id: no file"),
        ({"endpoint": "/v1/images"}, "endpoint: '/v1/images' takes no batches"),
        ({"completion_window": "soon"}, "completion_window: 'soon'"),
        ({"completion_window": "999d"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata: an object"),
        ({"extra_body": {"colour": "red"}}, "colour: unknown field"),
    ):
        order: dict[str, Any] = {"input_file_id": good, "endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(openai.BadRequestError, match=words):
            host.client.batches.create(**{**order, **change})
    with pytest.raises(openai.BadRequestError, match="purpose: 'fine-tune'"):
        host.client.files.create(file=("x", b"x"), purpose="fine-tune")
    with pytest.raises(openai.NotFoundError, match="no batch 'batch_x'"):
        host.client.batches.retrieve("batch_x")
    url, headers = host.server.url, {"authorization": f"Bearer {KEY}"}
    for method, path, status, options in (
        ("POST", "/v1/files", 400, {"data": {"purpose": "batch"}}),
        ("POST", "/v1/batches", 400, {"content": b"{"}),
        ("GET", "/v1/batches?limit=0", 400, {}),
        ("GET", "/v1/files?order=up", 400, {}),
        ("GET", "/v1/batches?after=x", 400, {}),
    ):
        answer = httpx.request(method, url + path, **{"headers": headers, **options})  # type: ignore[arg-type]
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]
    assert httpx.get(url + "/v1/batches").status_code == 401
    # Refused by what it says of its length, before it is sent.
    with socket.create_connection(("127.0.0.1", host.port)) as line:
        head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-length: {10**9}\r\n\r\n"
        line.sendall(head.encode())
        assert b" 413 " in line.recv(100)


@pytest.mark.parametrize("page", ["batches.md", "clients.md"])
def test_examples_of_the_pages(host: Host, page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S)
    assert blocks
    script = "\n".join(blocks).replace("http://127.0.0.1:30000", host.server.url).replace('"none"', f'"{KEY}"')
    # The one thing that is not as on the page: this server asks for a key.
    script = script.replace(f'RuntimeEndpoint("{host.server.url}")', f'RuntimeEndpoint("{host.server.url}", "{KEY}")')
    # In a process of its own and from a file, where SGLang's language finds its functions' source.
    path = host.folder / f"{page}.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
