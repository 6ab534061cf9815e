"""Compiles the C kernels into the user's cache, once for each version of their sources.

    python -m asyncep_kernels.native.build

The compiler is Zig's C compiler, which a Python package ships: a machine needs none of its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from asyncep_kernels.native.isa import Isa, choose

_PACKAGE = Path(__file__).resolve().parent.parent
_HEADERS = _PACKAGE / "native"
_SOURCES = ("moe/cpu.c", "attention/cpu.c", "help/help.c", "norm/cpu.c", "rotary/cpu.c", "routing/cpu.c")
# The oldest glibc that has all we call; an older one than the machine's serves.
_TARGET = ("-target", "x86_64-linux-gnu.2.17")
_FLAGS = ("-std=gnu11", "-O3", "-fno-sanitize=all", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")


class BuildError(Exception):
    """The kernels could not be compiled; the message has the compiler's words."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``ASYNCEP_CACHE`` or the user's cache folder."""
    base = (
        os.environ.get("ASYNCEP_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncep"
    )
    return Path(base) / "kernels"


def library_path(isa: Isa) -> Path:
    """Where the library of the present sources is, or will be."""
    digest = hashlib.sha256(" ".join((*_TARGET, *_FLAGS, *isa.compiler_flags)).encode())
    for source in sorted((*(_PACKAGE / name for name in _SOURCES), *_HEADERS.glob("*.h"))):
        digest.update(source.read_bytes())
    return cache_folder() / f"asyncep-{isa.value}-{digest.hexdigest()[:16]}.so"


def build(isa: Isa) -> Path:
    """The compiled library; compiles it if it is not there (a few seconds). Processes that ask at once wait for one.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: the cache folder cannot be written.
    """
    path = library_path(isa)
    if path.exists():
        return path
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("the package 'ziglang', a C compiler, is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(isa, path)
    return path


def _compile(isa: Isa, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        sources = [str(_PACKAGE / name) for name in _SOURCES]
        command = [sys.executable, "-m", "ziglang", "cc", *_TARGET, *_FLAGS, *isa.compiler_flags]
        # Its own caches go with the folder: they are larger than what is compiled.
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}
        done = subprocess.run(
            [*command, f"-I{_HEADERS}", "-o", str(made), *sources], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise BuildError(f"the C compiler failed:\n{done.stderr.strip()}")
        made.rename(path)


def main() -> None:
    """Builds what this machine would use, and says what that is."""
    try:
        chosen = choose()
    except ValueError as error:
        sys.exit(f"kernels: {error}")
    if chosen is Isa.NONE:
        print("kernels: this CPU has no AVX512-BF16; torch's operators serve")
        return
    try:
        print(f"kernels: {build(chosen)}")
    except (BuildError, OSError) as error:
        sys.exit(f"kernels: not compiled, torch's operators serve and are slower: {error}")


if __name__ == "__main__":
    main()
