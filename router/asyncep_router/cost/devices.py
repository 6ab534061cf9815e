"""GPUs as their data sheets have them: dense rates, SXM modules. What a kernel cannot exceed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Number(Enum):
    """What is multiplied; its value is how configurations spell it."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 if self is Number.BF16 else 1


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are per second."""

    name: str
    architecture: str
    """What code is compiled for: sm_80 or sm_90."""
    processors: int
    """Multiprocessors."""
    products: Mapping[Number, float] = field(hash=False)
    """FLOPs (two a multiply-add) of the matrix units; no entry for what the device cannot multiply."""
    memory_bytes: float
    """Bytes read or written."""
    cache_bytes: float
    """Bytes from the L2 cache to the multiprocessors: published measurements, rounded; not in the data sheets."""
    link_bytes: float
    """Bytes received from the node's other devices."""
    host_bytes: float
    """Bytes received from the host."""

    def product_rate(self, number: Number) -> float:
        """FLOPs a second for such operands; e4m3 is widened to bf16 where it cannot be multiplied."""
        return self.products.get(number, self.products[Number.BF16])


A100 = Device(
    "A100 80GB",
    "sm_80",
    108,
    {Number.BF16: 312e12, Number.INT8: 624e12},
    memory_bytes=2.039e12,
    cache_bytes=5.0e12,
    link_bytes=300e9,
    host_bytes=32e9,
)
H100 = Device(
    "H100",
    "sm_90",
    132,
    {Number.BF16: 989e12, Number.FP8: 1979e12, Number.INT8: 1979e12},
    memory_bytes=3.35e12,
    cache_bytes=5.5e12,
    link_bytes=450e9,
    host_bytes=64e9,
)
H200 = Device(
    "H200",
    "sm_90",
    132,
    {Number.BF16: 989e12, Number.FP8: 1979e12, Number.INT8: 1979e12},
    memory_bytes=4.8e12,
    cache_bytes=5.5e12,
    link_bytes=450e9,
    host_bytes=64e9,
)
DEVICES = (A100, H100, H200)
