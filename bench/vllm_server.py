"""vLLM's CPU build as a peer: its server, from an environment of its own (`scripts/peer_vllm.sh`)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from peer_start import answering

from asyncep_sgl.process.ports import free_port

_KV_GIB = 3
# Tokens of a batch: what our ranks and SGLang compute at once at most.
_BATCH_TOKENS = 8192


@contextlib.contextmanager
def vllm_server(model: Path, folder: Path, longest: int) -> Iterator[str]:
    """Yields the URL of a server on all of this process's cores that answers.

    Args:
        folder: the environment that `scripts/peer_vllm.sh` made.
        longest: tokens of a prompt at most.

    Raises:
        RuntimeError: it ended before it answered; with the end of what it printed.
    """
    port = free_port()
    cores = sorted(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        # The model is a folder; nothing is to be asked on the network.
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(folder / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [
        "--served-model-name",
        "model",
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "bfloat16",
        "--skip-tokenizer-init",
    ]
    command += ["--max-model-len", str(longest + 1), "--max-num-batched-tokens", str(_BATCH_TOKENS)]
    with answering("vLLM", command, port, environment) as url:
        yield url
