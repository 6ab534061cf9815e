"""A checkpoint at least twice as large as the memory its server may take, against the same in memory."""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import models
from emulation.group import GroupServer, random_prompt
from emulation.large_checkpoint import large_qwen3
from emulation.memory_limit import memory_limit

PORT = 30100
# 32 layers of 277 MB: two slots stay small beside the 2.5 GB that the processes take by themselves.
CONFIG: dict[str, Any] = {
    **models.QWEN3_147M,
    "hidden_size": 1024,
    "moe_intermediate_size": 704,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
LIMIT = 4 << 30
KEPT = 1 << 28
FLAGS = ("--dp-size", "1", "--skip-tokenizer-init", "--max-total-tokens", "8192", "--disable-radix-cache")


def measure(quick: bool) -> dict[str, Any]:
    """Tokens a second in memory and from disk, for batches above T; what was read, kept and allowed.

    Raises:
        NoControlGroupsError: memory cannot be limited here.
    """
    config = models.QWEN3_TINY if quick else CONFIG
    model = large_qwen3("qwen3-tiny-by-layer" if quick else "qwen3-4b-32-layers", config)
    checkpoint = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    found: dict[str, Any] = {"checkpoint_bytes": checkpoint, "limit_bytes": LIMIT}
    _forget(model)
    with memory_limit(LIMIT) as group:
        flags = [*FLAGS, "--asyncep-expert-memory", str(KEPT if not quick else 1), "--asyncep-gather-depth", "2"]
        found["on_disk"] = _run(model, config, flags, group.command, quick, gathered=True)
    found["in_memory"] = _run(model, config, list(FLAGS), list, quick, gathered=False)
    found["answers_agree"] = found["on_disk"].pop("answers") == found["in_memory"].pop("answers")
    return found


def _forget(model: Path) -> None:
    """Drops the checkpoint from the page cache: what another process had read would not count for the limit."""
    for file in model.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _run(
    model: Path, config: dict[str, Any], flags: Sequence[str], within: Any, quick: bool, gathered: bool
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "asyncep", "serve", "--model-path", str(model), "--device", "cpu"]
        command += ["--port", str(PORT), *(["--asyncep-log-gathers"] if gathered else []), *flags]
        with log.open("wb") as output:
            process = subprocess.Popen(within(command), stdout=output, stderr=subprocess.STDOUT)
        server = GroupServer(f"http://127.0.0.1:{PORT}", process, log)
        try:
            server.ready()
            numbers = random.Random(1)
            vocabulary = config["vocab_size"]
            answers = [server.ask(random_prompt(numbers, 100, vocabulary)) for _ in range(3)]
            server.batches()
            tokens = 256 if quick else 4096
            rates = []
            for _ in range(2 if quick else 4):
                began = time.monotonic()
                server.ask(random_prompt(numbers, tokens, vocabulary))
                rates.append(tokens / (time.monotonic() - began))
            status = server.status()
            batches = server.batches()
        except BaseException:
            print(log.read_text()[-3000:])
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    # The first batch after the start finds slots filled and files not.
    found = {"tokens": tokens, "tokens_per_s": rates[1:], "median": statistics.median(rates[1:]), "answers": answers}
    if gathered:
        found["gather"] = status["gathers"][0]
        found["exposed_share"] = [sum(b["exposed_s"]) / b["step_s"] for b in batches[1:]]
    return found
