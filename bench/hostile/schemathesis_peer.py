"""Schemathesis, which lives in an environment of its own, on a server's OpenAPI schema."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

# What it does with a schema, one after the other. Its "examples" are those that a schema brings, and ours bring none.
_PHASES = ("fuzzing", "coverage")
# For its report, once it has been told to end.
_REPORT_SECONDS = 60.0


async def run_schemathesis(
    peer: Path, schema: str, url: str, key: str, *, seed: int, examples: int, seconds: float
) -> list[dict[str, Any]]:
    """What each of its phases finds: operations tried, requests sent, failures with the command of each, errors of its
    own, the end of its report.

    Args:
        schema: URL of the OpenAPI document.
        url: of the server that is tried.
        examples: of each operation and kind, at most.
        seconds: for each phase. For a model of as many fields as SGLang's it thinks up thousands of bodies a minute
            and does not come to an end; then it is told to report what it has.

    Raises:
        FileNotFoundError: it is not in ``peer``; with the script that puts it there.
    """
    program = peer.resolve() / "bin" / "st"
    if not program.exists():
        raise FileNotFoundError(f"no {program}: run scripts/peer_schemathesis.sh {peer}")
    command = [str(program), "run", schema, "--url", url, "--header", f"authorization: Bearer {key}"]
    command += ["--checks", "not_a_server_error", "--continue-on-failure"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "60", "--workers", "4"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-shrink"]
    return [{"url": url, "phase": phase, **await _run([*command, "--phases", phase], seconds)} for phase in _PHASES]


async def _run(command: list[str], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
            start_new_session=True,
        )
        report = asyncio.create_task(process.communicate())
        printed = b""
        try:
            done, _ = await asyncio.wait([report], timeout=seconds)
            if not done:
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                printed, _ = await asyncio.wait_for(report, _REPORT_SECONDS)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    return {"status": process.returncode, "in_time": bool(done), **summary(printed.decode(errors="replace"))}


def summary(text: str) -> dict[str, Any]:
    """The numbers of a printed report. Pure."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    return {
        "operations": number(r"Tested: (\d+)"),
        "requests": number(r"(\d+) generated"),
        "failures": number(r"ST\d+ Server error: (\d+)"),
        "errors": number(r"(\d+) errors? in [\d.]+s"),
        "commands": re.findall(r"Reproduce with:\s+(curl .*)", text)[:50],
        "report": text[-4000:],
    }
