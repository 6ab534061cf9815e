"""Batches whose server is killed in the middle, and batches on a disk that is full."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from hostile.chaos_server import OneServer
from hostile.disturb import Load, Result, note_end
from hostile.honest import Clients, Question, agree
from hostile.servers import KEY, Place, Running, serve

_STEP = 0.1
_DONE_SECONDS = 240.0
_OPEN = ("validating", "in_progress", "finalizing", "cancelling")


class Batches:
    """The Batch API of one server, as a client sees it."""

    def __init__(self, server: Running) -> None:
        self._client = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60)

    def upload(self, rows: Sequence[dict[str, Any]]) -> httpx.Response:
        content = "\n".join(json.dumps(row) for row in rows).encode()
        return self._client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "batch"})

    def order(self, file: str, endpoint: str) -> httpx.Response:
        body = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h"}
        return self._client.post("/v1/batches", json=body)

    def get(self, batch: str) -> dict[str, Any]:
        found: dict[str, Any] = self._client.get(f"/v1/batches/{batch}").raise_for_status().json()
        return found

    def cancel(self, batch: str) -> httpx.Response:
        return self._client.post(f"/v1/batches/{batch}/cancel")

    def delete(self, file: str) -> httpx.Response:
        return self._client.delete(f"/v1/files/{file}")

    def lines(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Of its output and error files together."""
        files = [batch[name] for name in ("output_file_id", "error_file_id") if batch.get(name)]
        texts = [self._client.get(f"/v1/files/{file}/content").raise_for_status().text for file in files]
        return [json.loads(line) for text in texts for line in text.splitlines()]


def rows(asked: Sequence[Question], count: int) -> list[dict[str, Any]]:
    """So many lines of a batch for the questions on one route, in turn."""
    return [
        {
            "custom_id": f"row-{at}",
            "method": "POST",
            "url": asked[at % len(asked)].path,
            "body": asked[at % len(asked)].body,
        }
        for at in range(count)
    ]


def checked(
    lines: Sequence[dict[str, Any]], count: int, asked: Sequence[Question], expected: Sequence[Sequence[float]]
) -> Counter[str]:
    """How many of a batch's lines are right, wrong, refused (in the error file), lost or there more than once. Pure."""
    seen = Counter(str(line["custom_id"]) for line in lines)
    found = Counter({"lost": sum(f"row-{at}" not in seen for at in range(count))})
    found["twice"] = sum(times - 1 for times in seen.values())
    for line in lines:
        at = int(line["custom_id"].removeprefix("row-"))
        response = line.get("response") or {}
        if response.get("status_code") != 200:
            found["refused"] += 1
            continue
        question = asked[at % len(asked)]
        right = agree(question.numbers(response["body"]), expected[at % len(asked)])
        found["right" if right else "wrong"] += 1
    return found


def for_batches(load: Load) -> tuple[list[Question], list[Sequence[float]]]:
    """The load's questions on one route that batches have."""
    kept = [(question, numbers) for question, numbers in zip(load.asked, load.expected, strict=True)
            if question.path == "/v1/completions"]  # fmt: skip
    return [question for question, _ in kept], [numbers for _, numbers in kept]


async def restarts(one: OneServer, here: Place, load: Load, count: int, kills: int) -> AsyncIterator[Result]:
    """kill -9 of the launcher in the middle of a batch, so many times; every line is answered right, once."""
    result = Result(f"batch of {count} lines, killed {kills} times")
    asked, expected = for_batches(load)
    server = await asyncio.to_thread(one.up)
    batches = Batches(server)
    file = batches.upload(rows(asked, count)).raise_for_status().json()["id"]
    batch = batches.order(file, "/v1/completions").raise_for_status().json()["id"]
    result.more["done_when_killed"] = []
    for number in range(kills):
        done = await _progress(batches, batch, (number + 1) * count // (kills + 3))
        result.more["done_when_killed"].append(done)
        server.stop(signal.SIGKILL)
        note_end(result, server, here)
        server = await asyncio.to_thread(one.up)
        result.left_on_disk = here.left_on_disk()
        result.serves_again_s = one.last_start_s
        batches = Batches(server)
    finished = await _finished(batches, batch)
    result.more |= {"status": finished["status"], "counts": finished["request_counts"]}
    _add(result, checked(batches.lines(finished), count, asked, expected))
    yield result


def _add(result: Result, counts: Counter[str]) -> None:
    result.right += counts["right"]
    result.wrong += counts["wrong"] + counts["twice"]
    result.refused += counts["refused"]
    result.lost += counts["lost"]
    result.more["lines"] = dict(counts)


async def _progress(batches: Batches, batch: str, lines: int) -> int:
    """Lines that are done once ``lines`` are, or the batch has ended."""
    deadline = time.monotonic() + _DONE_SECONDS
    while time.monotonic() < deadline:
        found = await asyncio.to_thread(batches.get, batch)
        counts = found["request_counts"] or {"completed": 0, "failed": 0}
        done = int(counts["completed"] + counts["failed"])
        if done >= lines or found["status"] not in _OPEN:
            return done
        await asyncio.sleep(_STEP)
    raise TimeoutError(f"batch {batch} stands still")


async def _finished(batches: Batches, batch: str, seconds: float = _DONE_SECONDS) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (found := await asyncio.to_thread(batches.get, batch))["status"] in _OPEN:
        if time.monotonic() > deadline:
            raise TimeoutError(f"batch {batch} stands still: {found['status']}, {found['request_counts']}")
        await asyncio.sleep(_STEP)
    return found


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes at ``folder``.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PermissionError(f"mount: {done.stderr.strip()} (this case needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """A file that takes all the space that is left."""
    path = folder / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return path


async def full_disk(here: Place, model: Path, load: Load, count: int) -> AsyncIterator[Result]:
    """The disk under the batches is full for a while: clients beside are served, a batch waits and goes on by itself,
    deleting and cancelling work, and an upload is refused with a reason."""
    result = Result("full disk under the batches")
    asked, expected = for_batches(load)
    with small_disk(here.folder / "small", "160m") as folder:  # room for what a batch promises to write
        server = serve(here, model, "--asyncep-batch-dir", str(folder / "batches"))
        try:
            await asyncio.to_thread(server.wait_ready, word=" ready in ")
            batches = Batches(server)
            ids = [batches.upload(rows(asked, count)).raise_for_status().json()["id"] for _ in range(3)]
            kept, cancelled = (
                batches.order(file, "/v1/completions").raise_for_status().json()["id"] for file in ids[:2]
            )
            async with Clients(server.url, load.asked, load.expected, KEY, 8) as clients:
                await _progress(batches, kept, 1)
                filler = fill(folder)
                began = time.monotonic()
                result.more["free_bytes"] = shutil.disk_usage(folder).free
                said = {
                    "upload": await _said(batches.upload, rows(asked, count)),
                    "cancel": await _said(batches.cancel, cancelled),
                    "delete": await _said(batches.delete, ids[2]),
                }
                # Until the batch has had to write: it stands, or what it had left fitted.
                await clients.answered(40)
                result.more["batch_while_full"] = (await asyncio.to_thread(batches.get, kept))["status"]
                filler.unlink()
                finished = await _finished(batches, kept)
                result.serves_again_s = round(time.monotonic() - began, 2)
                await clients.stop()
                result.count(clients)
            result.more |= {**said, "status": finished["status"], "temporary": _temporary(folder)}
            _add(result, checked(batches.lines(finished), count, asked, expected))
            # What a client is told on a full disk: done, or refused with a reason; never that the server is at fault.
            for what in ("upload", "cancel", "delete"):
                status = said[what].split(" ", 1)[0]
                if not (status.startswith(("2", "4")) or status in ("503", "507")):
                    result.faults.append(f"{what} on a full disk: {said[what]}")
                    result.lost += 1
            result.lost += len(result.more["temporary"])
        except (TimeoutError, httpx.HTTPError) as error:
            result.faults.append(f"{type(error).__name__}: {error}")
            result.lost += 1
        finally:
            server.stop()
            note_end(result, server, here)
    yield result


async def _said(ask: Any, argument: Any) -> str:
    try:
        response = await asyncio.to_thread(ask, argument)
    except httpx.HTTPError as error:
        return type(error).__name__
    return f"{response.status_code} {response.text[:200]}"


def _temporary(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*.tmp")]
