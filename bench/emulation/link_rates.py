"""Link speeds that stand for a device's: what one core of this machine computes, over what comes to it.

The ratio of a device's peak to its link decides from which batch on a gather is hidden. A core is not an H100, but with
a link that is slower by the same factor it meets the same question.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

# Dense bf16 FLOP/s, and bytes/s a device receives over NVLink.
RATIOS = {"H100": 990e12 / 450e9, "A100": 312e12 / 300e9}
_PEAK = """
import torch
torch.set_num_threads(1)
from asyncep_sgl.experts.gather.peak import gemm_flops_per_second
print(gemm_flops_per_second(torch.bfloat16))
"""


class Link(NamedTuple):
    """A link to measure: ``rate`` as tc writes it, and what it stands for."""

    rate: str
    stands_for: str


def core_peak() -> float:
    """FLOPs a second of a large bf16 matrix product on one core, in a process of its own."""
    core = str(sorted(os.sched_getaffinity(0))[0])
    command = ["taskset", "-c", core, sys.executable, "-c", _PEAK]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def by_ratio(peak: float) -> list[Link]:
    """The links that give a core of ``peak`` FLOP/s the FLOPs a byte of `RATIOS`."""
    return [Link(f"{peak / ratio * 8 / 1e6:.0f}mbit", device) for device, ratio in RATIOS.items()]
