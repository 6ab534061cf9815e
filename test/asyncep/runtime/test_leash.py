"""A server on a leash stops when the process it was started for is killed."""

from __future__ import annotations

import signal
import subprocess
import sys

# Says when it is on the leash; exits with 7 when told to stop in order.
LEASHED = """
import signal, sys
from asyncep.leashed import stop_with
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
stop_with(int(sys.argv[1]))
print("ready", flush=True)
signal.pause()
"""


def test_it_stops_when_its_owner_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    server = subprocess.Popen([sys.executable, "-c", LEASHED, str(owner.pid)], stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout:
        assert server.stdout.readline() == b"ready\n"
        assert server.poll() is None
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert server.wait(30) == 7


def test_it_does_not_start_for_a_process_that_is_gone() -> None:
    owner = subprocess.Popen([sys.executable, "-c", ""])
    owner.wait()
    done = subprocess.run([sys.executable, "-c", LEASHED, str(owner.pid)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has ended" in done.stderr
