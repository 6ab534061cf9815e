"""Text to token ids, as the server would: here, many at a time, where its tokenizer is at hand, else by asking it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from asyncep.client.errors import NOT_THE_PROMPTS, OptionError, RejectedError
from asyncep.client.generate import ServerApi
from asyncep.client.pieces import in_pieces

# Between them: bytes outside ASCII, runs of spaces, line breaks, digits, and an empty text, which shows what is added.
_TRIALS = ("A first line.\n\n  Second: 12345 naïve 日本語 🙂\tend", " label", "x\n", "")
# Texts and bytes of one request, and requests at once.
_TOKENIZE_TEXTS, _TOKENIZE_BYTES, _TOKENIZE_AT_ONCE = 256, 1 << 15, 4
# Characters that take less time than moving to a thread.
_TOKENIZE_HERE = 4096
_CHAT_TEXT = "asyncep-text-stands-here"


class TextTokens(Protocol):
    """Turns texts into token ids."""

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Token ids of each text; `Untokenized` for one that the server refuses.

        Args:
            special: add what the tokenizer puts around a text (a begin-of-text token).
        """
        ...


class LocalTokens:
    """The model's ``tokenizer.json``, run in threads without Python's lock."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """See `TextTokens`."""
        if sum(map(len, texts)) <= _TOKENIZE_HERE:
            return self.encode_now(texts, special=special)
        return await asyncio.to_thread(self.encode_now, texts, special=special)

    def encode_now(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The same, in this thread."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]


class Untokenized(list[int]):
    """In the place of a text's tokens: none, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class ServerTokens:
    """The server's ``/tokenize``, some texts at a time: servers bound what they take at once."""

    def __init__(self, client: ServerApi) -> None:
        self._client = client
        self._slots = asyncio.Semaphore(_TOKENIZE_AT_ONCE)

    async def encode(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """See `TextTokens`."""
        pieces = [
            self._piece(piece, special)
            for piece in in_pieces(
                texts, lambda text: len(text.encode()), most=_TOKENIZE_TEXTS, most_size=_TOKENIZE_BYTES
            )
        ]
        return [ids for piece in await asyncio.gather(*pieces) for ids in piece]

    async def _piece(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        async with self._slots:
            return await self._some(texts, special)

    async def _some(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        try:
            answer = await self._client.post("/tokenize", {"prompt": list(texts), "add_special_tokens": special})
        except RejectedError as rejected:
            if rejected.status in NOT_THE_PROMPTS:
                raise
            if len(texts) == 1:
                return [Untokenized(str(rejected))]
            # One text spoils all: halve until it stands alone with its reason.
            middle = len(texts) // 2
            return [*await self._some(texts[:middle], special), *await self._some(texts[middle:], special)]
        return [[int(token) for token in ids] for ids in answer["tokens"]]


async def tokens_for(client: ServerApi, folder: str | None) -> TextTokens:
    """The local tokenizer if it does what the server's does, else the server's.

    Args:
        folder: where the server says its tokenizer is; a path of another machine, or a hub name, is no harm.
    """
    remote = ServerTokens(client)
    path = Path(folder or "") / "tokenizer.json"
    if not path.is_file():
        return remote
    try:
        local = LocalTokens(Tokenizer.from_file(str(path)))
    except Exception:  # the library raises Exception itself for a file it cannot read
        return remote
    for special in (True, False):
        if await local.encode(_TRIALS, special=special) != await remote.encode(_TRIALS, special=special):
            return remote
    return local


async def chat_surroundings(client: ServerApi, before: str, after: str, system: str | None) -> tuple[str, str]:
    """What stands before and after a row's text once the prompt is a user's turn in the model's chat format.

    The server renders it: it has the template. The text's place is found by a mark, and the rendering is taken only if
    its text gives the same tokens again.

    Returns:
        text before and after, to be tokenized without special tokens: the template has written them.

    Raises:
        OptionError: the model has no chat template, or one that changes what it is given.
    """
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": f"{before}{_CHAT_TEXT}{after}"})
    try:
        tokens = (await client.post("/tokenize", {"messages": messages}))["tokens"]
        text = (await client.post("/detokenize", {"tokens": tokens, "skip_special_tokens": False}))["text"]
    except RejectedError as error:
        raise OptionError(f"chat: the model cannot be used with a chat template: {error}") from error
    again = (await ServerTokens(client).encode([text], special=False))[0]
    if text.count(_CHAT_TEXT) != 1 or again != tokens:
        raise OptionError(
            "chat: this model's chat template cannot be written as plain text; give the prompt as template"
        )
    start, _, end = text.partition(_CHAT_TEXT)
    return start, end
