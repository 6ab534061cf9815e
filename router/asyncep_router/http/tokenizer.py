"""Text to token ids, exactly as the workers do it, or not at all."""

from __future__ import annotations

import asyncio
import logging
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import orjson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from asyncep_router.http.worker import Worker

logger = logging.getLogger("asyncep_router")

# Below this many characters a thread costs more than the tokenizing.
_INLINE_CHARACTERS = 2000
_SECONDS = 30.0

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading blank, trailing blank ",
    "Zahlen 1234567890, Zeichen !?#$%&*()[]{}<>",
    "naïve café — 東京 🙂\n\n\ttabs and lines",
    "",
)
"""Texts on which the local tokenizer and a worker's must agree."""


class TokenizeError(Exception):
    """The text could not be tokenized; it is forwarded as it is."""


class Tokenizer(Protocol):
    """`vocabulary`: token ids it knows, as SGLang checks labels against; None if unknown."""

    kind: str
    vocabulary: int | None

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        """Token ids of each text, special tokens added. Raises `TokenizeError`."""


class LocalTokenizer:
    """The model's own, in this process; long texts in a thread (the tokenizer releases Python's lock)."""

    kind = "local"

    def __init__(self, encode: Callable[[str], list[int]], vocabulary: int) -> None:
        self._encode = encode
        self.vocabulary: int | None = vocabulary
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        if sum(map(len, texts)) < _INLINE_CHARACTERS:
            return self._now(texts)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._now, texts)

    def _now(self, texts: Sequence[str]) -> list[array[int]]:
        return [array("q", self._encode(text)) for text in texts]


def load_plain(path: str) -> LocalTokenizer | None:
    """From `tokenizer.json` alone, None if there is none: milliseconds, where transformers takes seconds and
    half a gigabyte. It may differ in special tokens, so only a comparison tells whether it will do."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer as Plain

    plain = Plain.from_file(str(file))
    plain.no_truncation()
    plain.no_padding()
    return LocalTokenizer(lambda text: plain.encode(text).ids, plain.get_vocab_size(with_added_tokens=False))


def load_full(path: str) -> LocalTokenizer | None:
    """As SGLang's servers load it, None for a folder that is not here. Raises what transformers raises."""
    if Path(path).is_absolute() and not Path(path).is_dir():
        return None
    from transformers import AutoTokenizer

    full: Any = AutoTokenizer.from_pretrained(path)
    return LocalTokenizer(full.encode, int(full.vocab_size))


class WorkerTokenizer:
    """A worker's `/tokenize`, asked over the network."""

    kind = "worker"
    vocabulary: int | None = None

    def __init__(self, session: aiohttp.ClientSession, worker: Worker) -> None:
        self._session = session
        self._worker = worker

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        body = orjson.dumps({"prompt": list(texts)})
        headers = {"Content-Type": "application/json"}
        if self._worker.api_key:
            headers["Authorization"] = f"Bearer {self._worker.api_key}"
        try:
            async with self._session.post(
                self._worker.url + "/tokenize", data=body, headers=headers, timeout=aiohttp.ClientTimeout(_SECONDS)
            ) as response:
                answer = orjson.loads(await response.read())
                tokens = answer["tokens"]
                found = [array("q", ids) for ids in tokens]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise TokenizeError(f"{self._worker.url}/tokenize: {type(error).__name__} {error}") from error
        if len(found) != len(texts):
            raise TokenizeError(f"{self._worker.url}/tokenize: {len(found)} answers for {len(texts)} texts")
        return found


async def choose(mode: str, path: str | None, session: aiohttp.ClientSession, worker: Worker) -> Tokenizer | None:
    """The tokenizer that `--tokenizer` asks for, checked against the worker; None: text is not tokenized."""
    if mode == "none":
        return None
    remote = WorkerTokenizer(session, worker)
    try:
        expected: list[array[int]] | None = await remote.encode(SAMPLES)
    except TokenizeError as error:
        logger.info("no worker to compare tokenizers with: %s", error)
        expected = None
    # Unchecked, only the way that the workers go themselves will do.
    loaders = (load_plain, load_full) if expected is not None else (load_full,)
    for load in loaders if path and mode in ("auto", "local") else ():
        try:
            local = await asyncio.to_thread(load, path or "")
        # The libraries raise what their parts raise; whichever it is, we go on without.
        except Exception as error:
            logger.warning("tokenizer %s cannot be loaded: %s", path, (str(error) or repr(error)).splitlines()[0])
            continue
        if local is not None and (expected is None or await local.encode(SAMPLES) == expected):
            return local
    if mode == "local":
        logger.warning("no tokenizer at %s agrees with that of %s", path, worker.url)
        return None
    return remote if expected is not None else None
