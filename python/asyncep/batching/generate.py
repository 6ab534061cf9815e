"""A server's ``/generate`` as an `Answerer`: lists of token ids in one body, few bytes, few requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import orjson

from asyncep.batching.errors import RejectedError, ServerError
from asyncep.batching.probes import Probe, Reading

_RETRIES = 5
_FIRST_WAIT_SECONDS = 0.25
# Worth another try: the server is busy, stopping, or a proxy before it has lost it for a moment.
_TRY_AGAIN = frozenset((408, 429, 500, 502, 503, 504))


class ServerApi(Protocol):
    """A server's endpoints, one server's or several's as if they were one."""

    url: str

    async def get(self, path: str) -> Any:
        """See `GenerateClient.get`."""
        ...

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """See `GenerateClient.post`."""
        ...


class GenerateClient:
    """Sends probes to one server. Belongs to the event loop it is entered in.

    Args:
        url: such as ``http://127.0.0.1:30000``.
        api_key: sent as bearer token.
        timeout: seconds without a byte from the server after which a request counts as failed.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 3600) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GenerateClient:
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """One reading a probe, see `probes.Answerer`."""
        body: dict[str, Any] = {
            "input_ids": [list(probe.ids) for probe in probes],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
        }
        if any(probe.next_ids for probe in probes):
            same = all(probe.next_ids == probes[0].next_ids for probe in probes)
            body["token_ids_logprob"] = (
                list(probes[0].next_ids) if same else [list(probe.next_ids) or None for probe in probes]
            )
        if any(probe.read_from is not None for probe in probes):
            # The log-probability of the token at a position is read one before it.
            body["logprob_start_len"] = [-1 if p.read_from is None else p.read_from - 1 for p in probes]
        if rank is not None:
            body["routed_dp_rank"] = rank
        found = await self.post("/generate", body)
        if not isinstance(found, list) or len(found) != len(probes):
            raise ServerError(f"{self.url}/generate: {len(probes)} answers expected, got {str(found)[:200]}")
        try:
            return [_reading(probe, answer["meta_info"]) for probe, answer in zip(probes, found, strict=True)]
        except (KeyError, IndexError, TypeError) as error:
            raise ServerError(f"{self.url}/generate: an answer of another form than SGLang's: {error!r}") from error

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded answer to a POST; a server that is briefly away is asked again, five times within eight seconds.

        Raises:
            RejectedError: a 4xx.
            ServerError: no answer, or a 5xx to the last.
        """
        return await self._ask("POST", path, orjson.dumps(body))

    async def get(self, path: str) -> Any:
        """The decoded answer to a GET, with the errors of `post`."""
        return await self._ask("GET", path, None)

    async def _ask(self, method: str, path: str, body: bytes | None) -> Any:
        if self._session is None:
            raise ServerError("the client is closed; use it in an async with")
        reason = ""
        for attempt in range(_RETRIES):
            if attempt:
                await asyncio.sleep(_FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                headers = {"Content-Type": "application/json"}
                async with self._session.request(method, self.url + path, data=body, headers=headers) as response:
                    raw = await response.read()
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"{self.url}: {error or type(error).__name__}"
                continue
            if response.status == 200:
                try:
                    return orjson.loads(raw)
                except orjson.JSONDecodeError as error:
                    raise ServerError(f"{self.url}{path}: not JSON: {raw[:200]!r}") from error
            reason = f"{path} answered {response.status}: {raw[:500].decode(errors='replace')}"
            if response.status not in _TRY_AGAIN:
                if 400 <= response.status < 500:
                    raise RejectedError(reason)
                break
        raise ServerError(reason)


def _reading(probe: Probe, info: dict[str, Any]) -> Reading:
    ending = info.get("finish_reason")
    if ending and ending.get("type") == "abort":
        raise ServerError(f"a request was aborted: {ending.get('message')}")
    after = info["output_token_ids_logprobs"][0] if probe.next_ids else ()
    own = info["input_token_logprobs"][-(len(probe.ids) - probe.read_from) :] if probe.read_from is not None else ()
    if [entry[1] for entry in after] != list(probe.next_ids):
        raise ServerError(f"asked for log-probabilities of tokens {list(probe.next_ids)}, got {after}")
    wanted = probe.ids[probe.read_from :] if probe.read_from is not None else ()
    # SGLang 0.5.23 names the vocabulary's last token 0 in this list; its value is the right token's.
    if len(own) != len(wanted) or any(entry[1] not in (token, 0) for entry, token in zip(own, wanted, strict=True)):
        raise ServerError(f"asked for log-probabilities of tokens {list(wanted)}, got {own}")
    return Reading([entry[0] for entry in after], [entry[0] for entry in own], info["cached_tokens"])
