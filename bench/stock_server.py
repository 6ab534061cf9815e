"""Stock SGLang's server on the plain-CPU platform, in any of its layouts."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from peer_start import answering

from asyncep_sgl.process.ports import free_port

# Nobody decodes here and nobody waits for a core that polls; the rest is SGLang's default.
_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--disable-overlap-schedule", "--sleep-on-idle"),
    *("--skip-server-warmup", "--log-level", "error"),
)


@contextlib.contextmanager
def stock_server(model: Path, flags: Sequence[str] = (), ranks: int = 1, tokens: int = 131072) -> Iterator[str]:
    """Yields the URL of a server that answers.

    Args:
        flags: its layout, ``--tp-size 2`` for one.
        ranks: processes that divide this host's cores.
        tokens: of each rank's KV cache.

    Raises:
        RuntimeError: it ended before it answered; with the end of what it printed.
    """
    port = free_port()
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank * len(cores) // ranks : (rank + 1) * len(cores) // ranks] for rank in range(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(shares[0])), "ASYNCEP_PLATFORM": "cpu"}
    environment["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, share)) for share in shares)
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port)]
    command += [*_FLAGS, "--max-total-tokens", str(tokens), *flags]
    with answering("stock SGLang", command, port, environment) as url:
        yield url
