"""Run by `test_supervisor`: a launcher with a front, and the front's children, without a model.

``supervised.py launcher GRACE`` is the launcher; it starts itself as ``front`` and ``exporter``, the front starts
``controller`` and ``detokenizer``. Each says hello and then sleeps; the front answers a drain after what ``DRAIN``
says: ``at once`` or ``never``.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from asyncep_sgl.experts.store.client import StoreClient
from asyncep_sgl.experts.store.messages import Done, Hello, Serving, Welcome
from asyncep_sgl.launcher.run_directory import run_directory
from asyncep_sgl.process.lifeline import die_with
from asyncep_sgl.process.stop_signals import DRAIN_SIGNAL, StopSignals


def launcher(grace: float) -> int:
    from asyncep_sgl.experts.store.server import StoreServer
    from asyncep_sgl.launcher.supervisor import Supervisor
    from asyncep_sgl.strategies.base import SideProcess

    logging.basicConfig(format="asyncep: %(message)s", level=logging.INFO)
    signals = StopSignals()
    signals.install()
    with run_directory() as directory:
        store = StoreServer(2, directory=directory)
        environment = {
            **os.environ,
            "STORE": store.address,
            "LAUNCHER": str(os.getpid()),
            "TMPDIR": str(directory),
        }

        def serving() -> None:
            for name, pid in store.registry.pids.items():
                print(name, pid, flush=True)
            print("directory", directory, flush=True)

        me = [sys.executable, __file__]
        supervisor = Supervisor(
            store,
            [*me, "front"],
            environment,
            grace,
            serving,
            side_processes=[SideProcess("exporter", (*me, "exporter"))],
        )
        supervisor.signals = signals
        supervisor.stopped_seconds = 0.5
        return supervisor.run()


def member(role: str) -> None:
    if role == "front":
        # Waited for below: a handler could run right before a pause that then has no end. Before any other thread is
        # started: one that does not block it would be given it, and the process would end.
        signal.pthread_sigmask(signal.SIG_BLOCK, [DRAIN_SIGNAL])
    die_with(int(os.environ["LAUNCHER"]), os.environ["TMPDIR"])
    line = StoreClient(os.environ["STORE"])
    if role == "front":
        for child in ("controller", "detokenizer"):
            ready, tells = os.pipe()
            subprocess.Popen([sys.executable, __file__, child, str(tells)], pass_fds=[tells])
            os.close(tells)
            os.read(ready, 1)
    line.ask(Hello(role, os.getpid()), Welcome)  # type: ignore[arg-type] # one of its literals
    if role == "exporter":
        Path(tempfile.gettempdir(), "exporter").touch()
    if role in ("controller", "detokenizer"):
        os.write(int(sys.argv[2]), b"x")
    if role == "front":
        while not Path(tempfile.gettempdir(), "exporter").exists():
            os.sched_yield()
        line.ask(Serving("http://nowhere"), Done)
    while True:
        if role == "front" and signal.sigwait([DRAIN_SIGNAL]) and os.environ["DRAIN"] == "at once":
            os._exit(0)
        signal.pause()


if __name__ == "__main__":
    if sys.argv[1] == "launcher":
        sys.exit(launcher(float(sys.argv[2])))
    member(sys.argv[1])
