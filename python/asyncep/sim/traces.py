"""Public traces as prompts: Mooncake (JSON lines) and Azure LLM inference (CSV).

Neither holds text. Mooncake gives a hash id for every 512 tokens of a prompt, equal ids for equal
contents after equal contents; token ids are made from them so that prompts share exactly what they
shared in production. Azure gives lengths only, so its prompts share nothing.
"""

from __future__ import annotations

import csv
import json
import random
from array import array
from datetime import datetime
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING
from zlib import crc32

from asyncep.sim.workloads import TimedPrompt, random_tokens
from asyncep_router.errors import TraceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOONCAKE_BLOCK = 512
"""Tokens per hash id, fixed by the trace's publishers."""


def read_trace(
    path: Path, *, limit: int | None = None, max_tokens: int | None = None, scale: float = 1.0, keep: float = 1.0
) -> list[TimedPrompt]:
    """A trace file by its name's end: `.jsonl` is Mooncake's, `.csv` Azure's. Raises `TraceError`.

    `limit`: the first so many requests of those kept. `scale`: lengths and shared blocks shrink (or grow) by this
    factor, so that prompts share the same part of themselves as in production. `keep`: the share of sessions that
    is kept, each with all its requests (Azure: of requests); what a session repeats then stays in the sample, which
    the first requests of a trace would lose. `max_tokens`: prompts are cut to it, after scaling.
    """
    readers = {".jsonl": read_mooncake, ".csv": read_azure}
    if path.suffix not in readers:
        raise TraceError(f"{path}: neither .jsonl (Mooncake) nor .csv (Azure)")
    return readers[path.suffix](path, limit=limit, max_tokens=max_tokens, scale=scale, keep=keep)


def read_mooncake(
    path: Path, *, limit: int | None = None, max_tokens: int | None = None, scale: float = 1.0, keep: float = 1.0
) -> list[TimedPrompt]:
    """A Mooncake trace; arguments as in `read_trace`. Raises `TraceError`.

    Memory: 8 bytes a token; the whole conversation trace is 145 million tokens, so do limit, scale or keep less.
    """
    return list(islice(_mooncake(path, max_tokens, scale, keep), limit))


def _kept(session: str, keep: float) -> bool:
    return keep >= 1 or crc32(session.encode()) < keep * 2**32


def _mooncake(path: Path, max_tokens: int | None, scale: float, keep: float) -> Iterator[TimedPrompt]:
    block = max(1, round(MOONCAKE_BLOCK * scale))
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                length, ids, millis = int(row["input_length"]), row["hash_ids"], float(row["timestamp"])
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}:{number}: not a Mooncake request: {error!r}") from error
            if len(ids) * MOONCAKE_BLOCK < length:
                raise TraceError(f"{path}:{number}: {len(ids)} blocks cannot hold {length} tokens")
            # The first block is the system prompt of all; the second tells one session from another.
            if not _kept(str(ids[min(1, len(ids) - 1)] if ids else number), keep):
                continue
            wanted = _scaled(length * block / MOONCAKE_BLOCK, max_tokens)
            tokens: array[int] = array("q")
            for hash_id in ids[: -(-wanted // block)]:
                tokens.extend(_block(hash_id, block))
            yield TimedPrompt(millis / 1000, tokens[:wanted])


@lru_cache(maxsize=4096)
def _block(hash_id: int, tokens: int) -> array[int]:
    return random_tokens(random.Random(hash_id), tokens)


def _scaled(length: float, max_tokens: int | None) -> int:
    whole = max(1, int(length))
    return whole if max_tokens is None else min(whole, max_tokens)


def read_azure(
    path: Path, *, limit: int | None = None, max_tokens: int | None = None, scale: float = 1.0, keep: float = 1.0
) -> list[TimedPrompt]:
    """An Azure trace; arguments as in `read_trace`. Raises `TraceError`."""
    return list(islice(_azure(path, max_tokens, scale, keep), limit))


def _azure(path: Path, max_tokens: int | None, scale: float, keep: float) -> Iterator[TimedPrompt]:
    with path.open(newline="") as lines:
        first: datetime | None = None
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                # Seven decimals of a second; Python reads six.
                at = datetime.fromisoformat(row["TIMESTAMP"][:26])
                length = int(row["ContextTokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise TraceError(f"{path}:{number}: not an Azure request: {error!r}") from error
            first = first or at
            if not _kept(str(number), keep):
                continue
            wanted = _scaled(length * scale, max_tokens)
            yield TimedPrompt((at - first).total_seconds(), random_tokens(random.Random(f"azure{number}"), wanted))
