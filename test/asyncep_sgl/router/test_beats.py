"""A rank's signs of life while it computes: no kernel keeps the interpreter to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from asyncep_sgl.router.wire import Beat, decode

# One call that takes a while, on one thread, as in a rank; it goes on until so many beats have come.
_KERNELS = {
    "a product of torch's": "a = torch.randn(3000, 3000); call = lambda: a @ a",
    "attention": (
        "q = torch.randn(1, 4, 6000, 32); "
        "call = lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)"
    ),
}
_SCRIPT = """
import sys, torch
from asyncep_sgl.rank.reports import start_beating
torch.set_num_threads(1)
{kernel}
start_beating(3, sys.argv[1])
print("computing", flush=True)
while True:
    call()
"""


@pytest.mark.parametrize("kernel", _KERNELS)
def test_a_rank_beats_while_it_computes(kernel: str, tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/reports"
    with zmq.Context() as context, context.socket(zmq.PULL) as line:
        line.linger = 0
        line.bind(address)
        script = _SCRIPT.format(kernel=_KERNELS[kernel])
        with subprocess.Popen([sys.executable, "-c", script, address], stdout=subprocess.PIPE) as rank:
            try:
                assert rank.stdout is not None
                assert rank.stdout.readline() == b"computing\n"
                for _ in range(4):
                    # As long as a silent rank is allowed.
                    assert line.poll(10_000), "it was silent"
                    assert decode(line.recv()) == Beat(3, rank.pid)
            finally:
                rank.kill()
