"""What a process does once it has started and means to stay."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h. Blocks of this size get pages of their own, which go back when the block is freed; said once, it
# stays, while glibc's own bound grows up to 32 MB with the blocks that it sees freed.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _OWN_PAGES = -1, -3, 1 << 20
_TRIM_SECONDS = 15.0


@contextmanager
def importing() -> Iterator[None]:
    """Looks for no garbage meanwhile: SGLang's import makes objects by the million, and hardly any garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """Collect garbage rarely from now on, and never look at what start-up left: requests leave no cycles behind.

    A process that has imported SGLang holds so many objects that a full collection takes some tenths of a second; a
    third of the router's time under load went into them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def return_memory() -> None:
    """Gives free memory back to the operating system from now on, in a thread; does nothing without glibc.

    glibc gives back only what is free at the end of a heap. One small object that stays behind a large request keeps
    all of it, and a process that takes many large ones grows to a multiple of what it holds.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    for bound in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        libc.mallopt(bound, _OWN_PAGES)

    def trim() -> None:
        while True:
            time.sleep(_TRIM_SECONDS)
            libc.malloc_trim(0)

    threading.Thread(target=trim, name="trim", daemon=True).start()
