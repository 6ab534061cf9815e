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

_SECONDS = 1500.0


async def run_schemathesis(peer: Path, schema: str, url: str, key: str, *, seed: int, examples: int) -> dict[str, Any]:
    """What it finds: requests sent, failures with the command of each, errors of its own, the end of its report.

    Args:
        schema: URL of the OpenAPI document.
        url: of the server that is tried.
        examples: of each operation and kind, at most.

    Raises:
        FileNotFoundError: it is not in ``peer``; with the script that puts it there.
    """
    program = peer.resolve() / "bin" / "st"
    if not program.exists():
        raise FileNotFoundError(f"no {program}: run scripts/peer_schemathesis.sh {peer}")
    command = [str(program), "run", schema, "--url", url, "--header", f"authorization: Bearer {key}"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing", "--continue-on-failure"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "60", "--workers", "4"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-shrink"]
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "NO_COLOR": "1"},
            start_new_session=True,
        )
        printed = b""
        try:
            with contextlib.suppress(TimeoutError):
                printed, _ = await asyncio.wait_for(process.communicate(), _SECONDS)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    return {"url": url, "status": process.returncode, **summary(printed.decode(errors="replace"))}


def summary(text: str) -> dict[str, Any]:
    """The numbers of a printed report. Pure."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    return {
        "requests": number(r"(\d+) generated"),
        "failures": number(r"ST\d+ Server error: (\d+)"),
        "errors": number(r"(\d+) errors? in [\d.]+s"),
        "commands": re.findall(r"Reproduce with:\s+(curl .*)", text)[:50],
        "report": text[-4000:],
    }
