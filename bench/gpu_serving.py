"""Servers for the GPU check and bench: ours and stock SGLang on the same model, and what both are asked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import torch
from stock_end import ended_whole

from asyncep_sgl.process.ports import free_port

START_SECONDS = 600.0
LABELS = (3, 17, 101, 256, 511)
# SGLang on this project's CPU platform, where there is no GPU.
CPU_FLAGS = ("--device", "cpu", "--attention-backend", "torch_native", "--skip-server-warmup", "--sleep-on-idle")


@contextlib.contextmanager
def stock_server(model: str, flags: Sequence[str]) -> Iterator[str]:
    """``sglang.launch_server`` on a free port; yields its URL.

    Raises:
        RuntimeError: it did not come up; carries what it printed last.
    """
    port = free_port()
    on_cpu = () if torch.cuda.is_available() else CPU_FLAGS
    command = [
        sys.executable,
        "-m",
        "sglang.launch_server",
        "--model-path",
        model,
        "--port",
        str(port),
        *on_cpu,
        *flags,
    ]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        with ended_whole(process):
            _wait(process, f"http://127.0.0.1:{port}", log.fileno())
            yield f"http://127.0.0.1:{port}"


def _wait(process: subprocess.Popen[bytes], url: str, log: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        time.sleep(0.5)
    size = os.fstat(log).st_size
    printed = os.pread(log, 2000, max(0, size - 2000)).decode(errors="replace")
    raise RuntimeError(f"stock SGLang did not come up: {printed}")


def prompts(count: int, length: int, vocabulary: int, *, shared: int = 0, seed: int = 0) -> list[list[int]]:
    """Random token ids; the first ``shared`` tokens are the same in all."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(3, vocabulary, (shared,), generator=generator).tolist()
    return [head + torch.randint(3, vocabulary, (length - shared,), generator=generator).tolist() for _ in range(count)]


def log_probabilities(url: str, batch: list[list[int]]) -> torch.Tensor:
    """``(prompts, labels)``: of each label after each prompt."""
    body = {
        "input_ids": batch,
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "token_ids_logprob": list(LABELS),
    }
    answers = httpx.post(f"{url}/generate", json=body, timeout=600).raise_for_status().json()
    rows = []
    for answer in answers:
        found = {token: value for value, token, _ in answer["meta_info"]["output_token_ids_logprobs"][0]}
        rows.append([found[label] for label in LABELS])
    return torch.tensor(rows)


def tokens_per_second(url: str, batch: list[list[int]], *, clients: int) -> float:
    """Prompt tokens answered per second by so many clients, each with one request under way."""

    def one(prompt: list[int]) -> int:
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        client.post(f"{url}/generate", json=body).raise_for_status()
        return len(prompt)

    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(timeout=600, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        begin = time.perf_counter()
        total = sum(pool.map(one, batch))
        return total / (time.perf_counter() - begin)
