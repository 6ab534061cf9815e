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
import pytest

START = """
import json, os, resource, signal, sys, threading, time, types
from asyncep_sgl.process.prefork import PreforkContext, _waiting, fork_ahead, keep_templates, reap_orphans
from asyncep_sgl.process.prefork import template_pids
from prefork_targets import ask, with_children
sys.modules["marker_of_the_parent"] = types.ModuleType("marker_of_the_parent")
"""


def run(script: str) -> Any:
    """What ``script`` printed as JSON, in a process that has one thread."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
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
        "fork_ahead(2)\nos.kill(_waiting[0].pid, signal.SIGKILL)\n"
        "os.waitid(os.P_PID, _waiting[0].pid, os.WEXITED | os.WNOWAIT)\nprint(json.dumps(ask()))"
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
fork_ahead(2, {"with_children"})
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


def test_a_template_is_never_used_up_and_its_children_are_their_owners() -> None:
    answers, me, left = run(
        """
keep_templates()
answers = [ask(status) for status in range(12)]
children = [child.pid for child in __import__("psutil").Process().children()]
print(json.dumps([answers, os.getpid(), set(children) == template_pids()]))
"""
    )
    assert [status for _, status in answers] == list(range(12))
    assert all(found["forked"] and found["parent"] == me for found, _ in answers)
    # Nothing but the templates is left: neither zombies nor the processes between.
    assert left


def test_a_template_serves_threads_and_outlives_none_of_them() -> None:
    found, alive = run(
        """
from concurrent.futures import ThreadPoolExecutor
keep_templates()
with ThreadPoolExecutor(6) as pool:
    found = [done.result() for done in [pool.submit(ask, 1 + i) for i in range(6)]]
# The thread that started it has ended; a process that is forked does not end with it.
context = PreforkContext()
from prefork_targets import answer
ours, theirs = context.Pipe()
process = context.Process(target=answer, args=(theirs,))
thread = threading.Thread(target=process.start)
thread.start()
thread.join()
ours.recv()
time.sleep(0.2)
alive = process.is_alive()
ours.send("end")
process.join()
print(json.dumps([found, alive and process.exitcode == 0]))
"""
    )
    assert sorted(status for _, status in found) == [1, 2, 3, 4, 5, 6]
    assert all(answer["forked"] for answer, _ in found)
    assert alive


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_the_other_template_forks_one_for_one_that_is_gone(how: str) -> None:
    answers, whole, left = run(
        f"""
import asyncep_sgl.process.prefork as prefork
prefork._TEMPLATE_SECONDS = 0.5
keep_templates()
answers, whole = [], []
for turn in range(5):
    first = prefork._templates._templates[0].pid
    os.kill(first, signal.{how})
    answers.append(ask(turn))
    deadline = time.monotonic() + 10
    while (len(template_pids()) < 2 or first in template_pids()) and time.monotonic() < deadline:
        time.sleep(0.01)
    whole.append(len(template_pids() - {{first}}))
children = [child.pid for child in __import__("psutil").Process().children()]
print(json.dumps([answers, whole, set(children) == template_pids()]))
"""
    )
    assert [status for _, status in answers] == list(range(5))
    assert all(answer["forked"] for answer, _ in answers)
    assert whole == [2] * 5
    assert left


def test_a_template_that_is_killed_is_replaced_before_anybody_asks() -> None:
    assert run(
        """
keep_templates()
for old in list(template_pids()):
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (len(template_pids()) < 2 or old in template_pids()) and time.monotonic() < deadline:
        time.sleep(0.01)
print(json.dumps(len(template_pids()) == 2 and ask()[0]["forked"]))
"""
    )


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_where_all_templates_are_gone_one_is_started_anew(how: str) -> None:
    first, second, third, left = run(
        f"""
import asyncep_sgl.process.prefork as prefork
prefork._TEMPLATE_SECONDS = 0.5
keep_templates()
first = ask()
old = template_pids()
for pid in old:
    os.kill(pid, signal.{how})
second = ask(2)
third = ask(3)
left = [pid for pid in old if pid in template_pids() or os.path.exists(f"/proc/{{pid}}")]
print(json.dumps([first, second, third, left]))
"""
    )
    assert first[0]["forked"]
    # The new one has imported SGLang, not what the test had in this process.
    assert (second[1], third[1]) == (2, 3)
    assert [answer["imported"] for answer, _ in (second, third)] == [True, True]
    assert left == []


@pytest.mark.parametrize("forked", ["True", "False"])
def test_the_end_of_a_child_is_seen_on_the_pipe_that_it_was_to_write_to(forked: str) -> None:
    assert run(
        f"""
from prefork_targets import wait
if {forked}:
    keep_templates()
context = PreforkContext()
reader, writer = context.Pipe(duplex=False)
process = context.Process(target=wait, args=(writer,))
process.start()
first = reader.recv()
process.kill()
try:
    reader.recv()
except EOFError:
    print(json.dumps(first))
"""
    )


def test_what_a_template_forked_ends_with_its_owner() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
    script = (
        START
        + """
from prefork_targets import answer
keep_templates()
context = PreforkContext()
ours, theirs = context.Pipe()
process = context.Process(target=answer, args=(theirs,))
process.start()
ours.recv()
print(process.pid, *template_pids(), flush=True)
time.sleep(60)
"""
    )
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 3
        owner.kill()
    wait_gone(pids)


def test_orphans_are_reaped_and_children_left_alone() -> None:
    found = run(
        """
keep_templates()
# A process whose parent ends comes to this one, the next subreaper above.
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    orphan = os.fork()
    if orphan == 0:
        time.sleep(0.2)
        os._exit(7)
    os.write(writer, str(orphan).encode())
    os._exit(3)
orphan = int(os.read(reader, 20))
while __import__("psutil").Process(orphan).status() != "zombie":
    time.sleep(0.02)
while __import__("psutil").Process(child).status() != "zombie":
    time.sleep(0.02)
reap_orphans({child})
first = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
reap_orphans(template_pids())
print(json.dumps([first, os.path.exists(f"/proc/{orphan}")]))
"""
    )
    assert found == [3, False]


def test_children_that_wait_end_with_their_parent() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
    script = START + "fork_ahead(3)\nprint(*[c.pid for c in _waiting], flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 3
        parent.kill()
    wait_gone(children)


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
