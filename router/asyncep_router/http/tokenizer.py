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
    from collections.abc import Callable, Iterator, Sequence

    from asyncep_router.http.worker import Worker

logger = logging.getLogger("asyncep_router")

# Below this many characters a thread costs more than the tokenizing.
_INLINE_CHARACTERS = 2000
_SECONDS = 10.0
# After a worker has failed to tokenize, text is compared as text for so long.
_REST_SECONDS = 10.0
# A text with more characters is not tokenized here: the workers have a bound for it, and others' texts wait for it.
_LONGEST = 1_000_000
# So many characters are tokenized before another request's text has its turn.
_TURN = 100_000

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
        if max(map(len, texts)) > _LONGEST:
            raise TokenizeError(f"a text of more than {_LONGEST} characters")
        loop = asyncio.get_running_loop()
        found: list[array[int]] = []
        for turn in _turns(texts):
            found += await loop.run_in_executor(self._threads, self._now, turn)
        return found

    def _now(self, texts: Sequence[str]) -> list[array[int]]:
        return [array("q", self._encode(text)) for text in texts]


def _turns(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, as many at a time as have `_TURN` characters together."""
    turn: list[str] = []
    characters = 0
    for text in texts:
        if turn and characters + len(text) > _TURN:
            yield turn
            turn, characters = [], 0
        turn.append(text)
        characters += len(text)
    if turn:
        yield turn


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
    """`/tokenize` of a worker, asked over the network: of `first`, later of one of those that `workers` gives.

    When none answers, it is not asked again for a while, so that a worker that hangs delays few requests.
    """

    kind = "worker"
    vocabulary: int | None = None

    def __init__(self, session: aiohttp.ClientSession, first: Worker, workers: Callable[[], Sequence[Worker]]) -> None:
        self._session = session
        self._first = first
        self._workers = workers
        self._rests_until = float("-inf")

    async def encode(self, texts: Sequence[str]) -> list[array[int]]:
        loop = asyncio.get_running_loop()
        if loop.time() < self._rests_until:
            raise TokenizeError("no worker tokenized a short while ago")
        if max(map(len, texts), default=0) > _LONGEST:
            raise TokenizeError(f"a text of more than {_LONGEST} characters")
        worker = next(iter(self._workers()), self._first)
        try:
            return await self._ask(worker, texts)
        except TokenizeError:
            self._rests_until = loop.time() + _REST_SECONDS
            raise

    async def _ask(self, worker: Worker, texts: Sequence[str]) -> list[array[int]]:
        body = orjson.dumps({"prompt": list(texts)})
        headers = {"Content-Type": "application/json", **worker.headers()}
        limit = aiohttp.ClientTimeout(total=_SECONDS)
        try:
            async with self._session.post(
                worker.url + "/tokenize", data=body, headers=headers, timeout=limit, allow_redirects=False
            ) as response:
                answer = orjson.loads(await response.read())
                tokens = answer["tokens"]
                found = [array("q", ids) for ids in tokens]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, TypeError, KeyError, OverflowError) as error:
            raise TokenizeError(f"{worker.url}/tokenize: {type(error).__name__} {error}") from error
        if len(found) != len(texts):
            raise TokenizeError(f"{worker.url}/tokenize: {len(found)} answers for {len(texts)} texts")
        return found


async def choose(
    mode: str,
    path: str | None,
    session: aiohttp.ClientSession,
    worker: Worker,
    workers: Callable[[], Sequence[Worker]],
) -> Tokenizer | None:
    """The tokenizer that `--tokenizer` asks for, checked against the worker; None: text is not tokenized."""
    if mode == "none":
        return None
    remote = WorkerTokenizer(session, worker, workers)
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
