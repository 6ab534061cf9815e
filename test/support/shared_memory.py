"""Names in /dev/shm: what a test has left there, whatever another test run on this machine does meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil

_FOLDER = Path("/dev/shm")
_PATIENCE_SECONDS = 5.0


def names() -> set[str]:
    """What stands there now."""
    return set(os.listdir(_FOLDER))


def new_names(before: set[str]) -> set[str]:
    """Names that have come since and stay, but for those that a process uses that this one has not started."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        found = names() - before
        # A name may come and go meanwhile: another process makes it and takes it away.
        found = {name for name in found - _of_others(found) if (_FOLDER / name).exists()}
        if not found or time.monotonic() > deadline:
            return found
        # Another process' names: there is nothing to wait on.
        time.sleep(0.1)


def _of_others(wanted: set[str]) -> set[str]:
    if not wanted:
        return set()
    this = psutil.Process()
    own = {this.pid, *(child.pid for child in this.children(recursive=True))}
    used: set[str] = set()
    for process in psutil.process_iter():
        if process.pid not in own:
            used |= {name for name in wanted if name in _used_by(process.pid)}
    return used


def _used_by(pid: int) -> set[str]:
    found: set[str] = set()
    folder = Path("/proc", str(pid))
    paths: list[str] = []
    # What ends meanwhile, the process or one of its descriptors, uses nothing any more.
    with contextlib.suppress(OSError):
        paths += [line.split(maxsplit=5)[-1] for line in (folder / "maps").read_text().splitlines()]
    with contextlib.suppress(OSError):
        for each in (folder / "fd").iterdir():
            with contextlib.suppress(OSError):
                paths.append(os.readlink(each))
    for path in paths:
        if path.startswith(f"{_FOLDER}/"):
            found.add(path.removeprefix(f"{_FOLDER}/").removesuffix(" (deleted)"))
    return found
