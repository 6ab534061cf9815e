"""Processes forked ahead: what they inherit, how they end, and what happens when there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

START = """
import json, os, resource, signal, sys, threading, time, types
from asyncep_sgl.prefork import PreforkContext, fork_ahead, _waiting
from prefork_targets import ask, with_children
sys.modules["marker_of_the_parent"] = types.ModuleType("marker_of_the_parent")
"""


def run(script: str) -> Any:
    """What ``script`` printed as JSON, in a process that has one thread."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", START + script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_child_takes_over_the_parent_s_modules_environment_and_limits() -> None:
    (found, status), me = run(
        """
fork_ahead(1)
os.environ["MOOD"] = "set after the fork"
resource.setrlimit(resource.RLIMIT_NOFILE, (777, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(json.dumps([ask(status=3), os.getpid()]))
"""
    )
    assert status == 3
    assert found["forked"]
    assert found["parent"] == me
    assert found["MOOD"] == "set after the fork"
    assert found["files"] == 777


def test_without_children_processes_are_spawned() -> None:
    first, second = run("fork_ahead(1)\nprint(json.dumps([ask(), ask(4)]))")
    assert first[0]["forked"]
    assert not second[0]["forked"]
    assert second[1] == 4


def test_a_child_that_has_died_is_passed_over() -> None:
    found, status = run(
        "fork_ahead(2)\nos.kill(_waiting[0].pid, signal.SIGKILL)\ntime.sleep(0.2)\nprint(json.dumps(ask()))"
    )
    assert found["forked"]
    assert status == 0


def test_a_process_with_threads_forks_none() -> None:
    forked, (found, _) = run(
        """
threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
print(json.dumps([fork_ahead(2), ask()]))
"""
    )
    assert forked == 0
    assert not found["forked"]


def test_a_forked_process_forks_its_own_ahead_and_holds_nothing_of_others() -> None:
    (child, grandchildren), first = run(
        """
fork_ahead(2, {"with_children": 3})
first = ask()[0]
context = PreforkContext()
ours, theirs = context.Pipe()
process = context.Process(target=with_children, args=(theirs,))
process.start()
print(json.dumps([ours.recv(), first]))
process.join()
"""
    )
    # Neither its parent's line and pipe nor the lines of those that were forked before it.
    for found in grandchildren:
        assert found["forked"]
        assert found["parent"] == child
        assert found["descriptors"] == first["descriptors"]


def test_children_that_wait_end_with_their_parent() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    script = START + "fork_ahead(3)\nprint(*[c.pid for c in _waiting], flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 3
        parent.kill()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
