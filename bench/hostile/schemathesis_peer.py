"""Schemathesis, which lives in an environment of its own, on a server's OpenAPI schema."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# What it does with a schema, one after the other. Its "examples" are those that a schema brings, and ours bring none.
_PHASES = ("fuzzing", "coverage")
# Told to end, it first thinks up the bodies that it has begun, which takes minutes for a large model; then it reports.
_REPORT_SECONDS = 240.0


async def run_schemathesis(
    peer: Path,
    schema: str,
    url: str,
    key: str,
    *,
    apart: Sequence[str],
    seed: int,
    examples: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """What each of its phases finds: operations tried, requests sent, failures with the command of each, errors of its
    own, the end of its report.

    Args:
        schema: URL of the OpenAPI document.
        url: of the server that is tried.
        apart: paths that are tried after all others, so that their large bodies hold up nobody.
        examples: of each operation and kind, at most.
        seconds: for each run. For a model of as many fields as SGLang's it thinks up thousands of bodies a minute and
            does not come to an end; then it is told to report what it has.

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
    parts = {"small bodies": [f"--exclude-path={path}" for path in apart]}
    if apart:
        parts["large bodies"] = [f"--include-path={path}" for path in apart]
    return [
        {"url": url, "phase": phase, "part": part, **await _run([*command, *flags, "--phases", phase], seconds)}
        for phase in _PHASES
        for part, flags in parts.items()
    ]


async def _run(command: list[str], seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.ndjson"
        process = await asyncio.create_subprocess_exec(
            *command,
            *("--report-ndjson-path", str(events)),
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
        told = counted(events.read_text().splitlines() if events.exists() else [])
    found = {**summary(printed.decode(errors="replace")), **told}
    return {"status": process.returncode, "in_time": bool(done), **found}


def counted(events: Iterable[str]) -> dict[str, int]:
    """Operations tried, requests sent and failures of the events that it writes as it goes. Pure.

    They are there even where it was killed before it could report.
    """
    found = {"operations": 0, "requests": 0, "failures": 0}
    for line in events:
        try:
            event = json.loads(line).get("ScenarioFinished")
        except ValueError:  # the last line of one that was killed
            continue
        if event is None:
            continue
        # An operation for which it found nothing to send has none.
        sent = event["recorder"].get("interactions", {})
        answers = [one.get("response") or {} for one in sent.values()]
        found["operations"] += bool(answers)
        found["requests"] += len(answers)
        found["failures"] += sum(answer.get("status_code", 0) >= 500 for answer in answers)
    return found


def summary(text: str) -> dict[str, Any]:
    """What only the printed report says: errors of its own, and commands. Pure."""

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    return {
        "errors": number(r"(\d+) errors? in [\d.]+s"),
        "commands": re.findall(r"Reproduce with:\s+(curl .*)", text)[:50],
        "report": text[-4000:],
    }
