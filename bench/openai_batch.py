"""A batch of the official `openai` client, its server killed half-way and started again. Part of `bench/jobs.py`."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
from peer_start import await_answer

from asyncep_sgl.process.ports import free_port


def batch_survives_a_kill(model: Path, prompts: list[str]) -> dict[str, Any]:
    """Sends `prompts` as one batch, kills the server with half of them answered, starts it again, and counts.

    Returns:
        rows, answered at the kill, seconds without the two starts, whether every row is in the output once.
    """
    rows = [
        {
            "custom_id": f"row-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "default", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1},
        }
        for number, prompt in enumerate(prompts)
    ]
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(_client(port)) as client:
        with _server(model, port, Path(folder), signal.SIGKILL):
            began = time.perf_counter()
            file = client.files.create(file=("rows.jsonl", _jsonl(rows)), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
            while (half := _answered(client, batch.id)) < len(rows) // 2:
                time.sleep(0.1)
            seconds = time.perf_counter() - began
        with _server(model, port, Path(folder), signal.SIGTERM):
            began = time.perf_counter()
            kept = _answered(client, batch.id)
            while (batch := client.batches.retrieve(batch.id)).status in ("in_progress", "finalizing"):
                time.sleep(0.1)
            seconds += time.perf_counter() - began
            output = client.files.content(batch.output_file_id).text if batch.output_file_id else ""
    found = Counter(json.loads(line)["custom_id"] for line in output.splitlines())
    return {
        "rows": len(rows),
        "answered_at_the_kill": half,
        "kept_over_the_kill": kept,
        "status": batch.status,
        "every_row_once": found == Counter(row["custom_id"] for row in rows),
        "seconds_without_starts": seconds,
    }


def _client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def _answered(client: openai.OpenAI, batch_id: str) -> int:
    counts = client.batches.retrieve(batch_id).request_counts
    return counts.completed if counts else 0


def _jsonl(rows: list[dict[str, Any]]) -> io.BytesIO:
    return io.BytesIO("\n".join(json.dumps(row) for row in rows).encode())


@contextlib.contextmanager
def _server(model: Path, port: int, state: Path, end: signal.Signals) -> Iterator[None]:
    """``asyncep serve`` with two ranks; ended by `end`, and all of it gone afterwards."""
    command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(model), "--port", str(port)]
    command += ["--dp-size", "2", "--log-level", "error", "--asyncep-batch-dir", str(state)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            await_answer("asyncep serve", process, log, f"http://127.0.0.1:{port}")
            yield
        finally:
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(end)
            process.wait()
            psutil.wait_procs(children, timeout=30)
