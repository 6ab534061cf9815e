"""What a long-lived process keeps."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import ctypes, json, os, time
from asyncep_router import long_lived

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
# Blocks too small for pages of their own, of which the last one stays.
blocks = [libc.malloc(100_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
before = resident()
for block in blocks[:-1]:
    libc.free(block)
freed = resident()
long_lived._TRIM_SECONDS = 0.05
long_lived.return_memory()
deadline = time.monotonic() + 30
while resident() > before - 80_000_000 and time.monotonic() < deadline:
    time.sleep(0.05)
print(json.dumps([before, freed, resident()]))
"""


def test_free_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, freed, returned = json.loads(done.stdout)
    # Not by itself: the last block keeps all before it.
    assert before - freed < 20_000_000
    assert before - returned > 80_000_000
