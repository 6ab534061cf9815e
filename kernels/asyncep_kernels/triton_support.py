"""What every Triton kernel here shares: casts that the interpreter gets right, and how kernels are launched.

Import it only through a ``triton.py``; nothing else in the package needs Triton. `INTERPRETED` is set by the
environment variable ``TRITON_INTERPRET=1``, which must be there before Triton is first imported in the process.

Triton's interpreter (3.8.0) rounds fp32 to bf16 by cutting bits off, loses the carry when it rounds to e4m3, and
multiplies bf16 matrices as if they were integers. Where ``INTERPRETED`` is given to a kernel, it rounds by
arithmetic and multiplies in fp32, which is what the GPU's instructions compute; elsewhere those lines do not exist.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

FP8_LARGEST = tl.constexpr(448.0)
INT8_LARGEST = tl.constexpr(127.0)
# Below it a row counts as zero, so that no scale is.
SMALLEST = tl.constexpr(1e-10)


@triton.jit
def _half_even(x):
    """Nearest integer of fp32 numbers below 2**22, ties to even: adding 1.5 * 2**23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def round_to(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to ``dtype``, to nearest even. For e4m3, ``x`` must be within ±448."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = bits + 0x7FFF + ((bits >> 16) & 1)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        elif dtype == tl.float8e4nv:
            # A step of e4m3 at x's exponent, 2**-9 below the normal range; then the cast is exact.
            bits = x.to(tl.int32, bitcast=True)
            exponent = tl.maximum((bits >> 23) & 0xFF, 127 - 6)
            step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
            return (_half_even(x / step) * step).to(tl.float8e4nv)
        else:
            return x.to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def multiply(a, b, acc, INTERPRETED: tl.constexpr):
    """``a @ b``, added to ``acc`` unless it is None: sums in fp32 (of fp32 without tf32), of int8 in int32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        wide_a = (a.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        wide_b = (b.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        return tl.dot(wide_a, wide_b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def e4m3_to_bf16(bits, INTERPRETED: tl.constexpr):
    """e4m3 as uint8 to bf16, exactly, by integers: devices before sm_89 have no such conversion. NaN is not kept.

    Sign, exponent and fraction are put where fp32 has them; 2**120 mends the exponent's bias (127 - 7).
    """
    wide = bits.to(tl.uint32)
    value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return round_to(value, tl.bfloat16, INTERPRETED)


def power_of_two(n: int) -> int:
    """The least power of two at or above ``n``, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Runs ``kernel`` over ``grid``; nothing for an empty one, which CUDA refuses."""
    if all(grid):
        kernel[grid](*args, **meta)
