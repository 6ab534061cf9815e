"""Stock SGLang over two emulated hosts, whatever its layout: one server of two processes, or one server a host."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
from emulation.two_hosts import Hosts
from stock_end import end_with_parent

from asyncep_sgl.process.host import COMPUTING

PORT = 30000
START_SECONDS = 300
_BASELINES = Path(__file__).parents[1] / "baselines"
# What every host gets of its own: SGLang believes that processes with the same /dev/shm and hostname are on one host.
_OWN = 'hostname "host-$0" && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


def _plugin(folder: Path) -> str:
    """A PYTHONPATH under which SGLang finds ``asyncep_baselines`` as an installed plug-in."""
    meta = folder / "asyncep_baselines-0.dist-info"
    meta.mkdir(exist_ok=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: asyncep-baselines\nVersion: 0\n")
    (meta / "entry_points.txt").write_text("[sglang.srt.plugins]\nbaselines = asyncep_baselines:register\n")
    return f"{folder}:{_BASELINES}"


def _environment(hosts: Hosts, host: int, folder: Path, kernels: str, extra: Mapping[str, str]) -> dict[str, str]:
    own = sorted(os.sched_getaffinity(0))
    core = own[host % len(own)]
    return {
        **os.environ,
        "PYTHONPATH": _plugin(folder),
        "ASYNCEP_PLATFORM": "cpu",
        "TMPDIR": str(folder),
        "ASYNCEP_BASELINE_KERNELS": kernels,
        "SGLANG_CPU_OMP_THREADS_BIND": "|".join([str(core)] * 2),
        "OMP_NUM_THREADS": "1",
        "SGLANG_HOST_IP": hosts.address(host),
        "GLOO_SOCKET_IFNAME": hosts.interface(host),
        # Stock SGLang is measured as it comes.
        **(COMPUTING if kernels == "ours" else {}),
        **extra,
    }


@contextlib.contextmanager
def layout(
    hosts: Hosts,
    model: Path,
    flags: Sequence[str],
    *,
    spanning: bool,
    kernels: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[list[str]]:
    """Stock SGLang with ``flags``, one core a host, ready; yields the URLs to send to.

    Args:
        spanning: one server over both hosts (``--nnodes 2``); otherwise each host has a whole one.
        kernels: ``ours`` or ``sglang``.
        environment: more variables.

    Raises:
        RuntimeError: it did not become ready. What goes wrong carries the end of what the servers printed as a note.
    """
    started: list[tuple[subprocess.Popen[bytes], Path]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for host in (0, 1):
                command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu"]
                command += ["--host", "0.0.0.0", "--port", str(PORT), "--skip-tokenizer-init", "--skip-server-warmup"]
                command += ["--attention-backend", "torch_native", "--disable-overlap-schedule", "--sleep-on-idle"]
                if spanning:
                    command += ["--nnodes", "2", "--node-rank", str(host), "--dist-init-addr", hosts.rendezvous]
                apart = ["unshare", "-m", "-u", "sh", "-c", _OWN, str(host), *command, *flags]
                log = folder / f"{host}.txt"
                with log.open("wb") as output:
                    process = subprocess.Popen(
                        hosts.command(host, apart),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=_environment(hosts, host, folder, kernels, environment or {}),
                        start_new_session=True,
                        preexec_fn=end_with_parent,
                    )
                started.append((process, log))
            urls = [hosts.url(host, PORT) for host in ((0,) if spanning else (0, 1))]
            for url in urls:
                _wait(url, started)
            yield urls
        except Exception as error:
            error.add_note(_said(started))
            raise
        finally:
            _end([process for process, _ in started])


def _wait(url: str, started: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and all(process.poll() is None for process, _ in started):
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/model_info", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"no server at {url}")


def _said(started: Sequence[tuple[subprocess.Popen[bytes], Path]]) -> str:
    return "\n".join(f"-- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for _, log in started)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SGLang's processes lead a session each host; stock SGLang does not always end all of them."""
    for signal_number, seconds in ((signal.SIGTERM, 4.0), (signal.SIGKILL, 10.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(_alive(process) for process in processes):
            time.sleep(0.1)
    for process in processes:
        process.wait()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps it, so that the group can end
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
