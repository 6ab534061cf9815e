"""The C kernels as Python functions, and threads to run them on."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_float, c_int, c_int64, c_uint8, c_void_p
from functools import lru_cache

import torch

from asyncep_kernels.native.build import BuildError, build
from asyncep_kernels.native.isa import Isa, allow_tiles, choose

logger = logging.getLogger("asyncep.kernels")

_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "asyncep_moe_route": (c_int64, (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "asyncep_moe_blocks": (c_int64, (c_void_p, c_int64)),
    "asyncep_moe_experts": (
        c_int,
        (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "asyncep_help_ring": (None, (c_void_p,)),
    "asyncep_help_open": (None, (c_void_p, c_int64, c_void_p)),
    "asyncep_help_compute": (c_int, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "asyncep_help_close": (c_int64, (c_void_p, c_int64, c_void_p, c_int64)),
    "asyncep_help_others": (
        c_int64,
        (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
    ),
    "asyncep_moe_combine": (
        None,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64),
    ),
    "asyncep_attention_blocks": (c_int64, (c_void_p, c_int64, c_int64)),
    "asyncep_attention": (c_int, (c_void_p, c_void_p, c_void_p)),
    "asyncep_rms_norm": (
        c_int,
        (
            *(c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_float, c_int64, c_int64, c_int64, c_int64),
            *(c_void_p, c_int64, c_void_p, c_int64),
        ),
    ),
    "asyncep_rotary": (
        None,
        (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64),
    ),
    "asyncep_route_softmax": (
        None,
        (c_void_p, c_int64, c_int, c_int64, c_int64, c_int, c_int64, c_int64, c_void_p, c_void_p),
    ),
}


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The kernels for this machine; None, said once in the log, where they cannot be had."""
    isa = choose()
    if isa is Isa.AMX and not allow_tiles():
        logger.warning("the kernel gives this process no AMX registers; AVX512-BF16 is used")
        isa = Isa.AVX512_BF16
    if isa is Isa.NONE:
        return None
    try:
        found = ctypes.CDLL(str(build(isa)))
    except (BuildError, OSError) as error:
        logger.warning("CPU kernels are not available, torch's operators serve and are slower: %s", error)
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def needed() -> ctypes.CDLL:
    """The kernels, for what is only called where they serve.

    Raises:
        RuntimeError: they do not.
    """
    kernels = library()
    if kernels is None:
        raise RuntimeError("the C kernels are not loaded")
    return kernels


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="asyncep-kernel")


class Blocks(ctypes.Structure):
    """``struct blocks`` of blocks.h."""

    _fields_ = (("next", c_void_p), ("done", c_void_p), ("who", c_uint8), ("idle", c_void_p))


def share(run: Callable[[object], int]) -> None:
    """Runs ``run`` on as many threads as torch uses, each with the same blocks, of which none is begun.

    Raises:
        MemoryError: one returned another number than 0.
    """
    counter = c_int64(0)
    blocks = ctypes.byref(Blocks(ctypes.addressof(counter)))
    on_threads(lambda: run(blocks))


def on_threads(run: Callable[[], int]) -> None:
    """Runs ``run`` on as many threads as torch uses, at once.

    Raises:
        MemoryError: one returned another number than 0.
    """
    others = torch.get_num_threads() - 1
    futures = [_pool(others).submit(run) for _ in range(others)]
    results = [run(), *(future.result() for future in futures)]
    if any(results):
        raise MemoryError("no memory for a kernel's scratch buffers")


def split(count: int, run: Callable[[int, int], int | None], least: int = 256) -> None:
    """Runs ``run(first, last)`` over ``count`` rows, on as many threads as torch uses and ``least`` rows are worth.

    Raises:
        MemoryError: one returned another number than 0.
    """
    parts = max(1, min(torch.get_num_threads(), count // least))
    bounds = [count * part // parts for part in range(parts + 1)]
    futures = [_pool(parts - 1).submit(run, bounds[p], bounds[p + 1]) for p in range(1, parts)]
    results = [run(0, bounds[1]), *(future.result() for future in futures)]
    if any(results):
        raise MemoryError("no memory for a kernel's scratch buffers")
