"""A server's ``/generate`` as an `Answerer`: lists of token ids in one body, few bytes, few requests."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import aiohttp
import orjson

from asyncep.client.address import lasting_socket, server_url
from asyncep.client.errors import RejectedError, ServerError
from asyncep.client.probes import Probe, Reading

_RETRIES = 5
_FIRST_WAIT_SECONDS = 0.25
# Worth another try: the server is busy, stopping, or a proxy before it has lost it for a moment.
_TRY_AGAIN = frozenset((408, 429, 500, 502, 503, 504))
# What a server says of a request that two ranks have died of (500): to send it again is to no purpose.
_FINAL = b"quarantined"
_CONNECT_SECONDS = 10.0
# Questions about the server, which need no rank's work; all tries of one together.
_QUESTION_SECONDS = 30.0
# Texts to tokens and back, a few at a time.
_TEXT_SECONDS = 120.0
# A server may say when to come again; it is asked no later than so.
_LONGEST_WAIT_SECONDS = 60.0
# While an answer is awaited for so long, the server is asked whether it is still there, so many times.
_LOOK_SECONDS = 60.0
_LOOKS = 3
# Behind the requests of people who wait, as batches are.
BEHIND = -1


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a server answered, and in how many seconds it wants to be asked again, if it says so."""

    status: int
    raw: bytes
    again: float | None


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
        certificate: PEM file of the certificate to trust, whatever host it names and whoever signed it; by default
            those that the system trusts.
        timeout: seconds without a byte from the server after which a request counts as failed.

    A connection has 10 s to come about. A question (every GET) has 30 s in all, tokens of texts 120 s. Work has no
    limit but `timeout`; while its answer is awaited the server is looked after, and one that says nothing any more, to
    nothing, is given up.

    Raises:
        OptionError: the URL is none.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, certificate: str | None = None, timeout: float = 3600
    ) -> None:
        self.url = server_url(url)
        self._trust: ssl.SSLContext | bool = True
        if certificate is not None:
            self._trust = ssl.create_default_context(cafile=certificate)
            # It is trusted for itself, whoever has signed it.
            self._trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            self._trust.check_hostname = False
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._heard: float | None = None
        self._looking: asyncio.Future[bool] | None = None

    async def __aenter__(self) -> GenerateClient:
        connector = aiohttp.TCPConnector(limit=0, ssl=self._trust, socket_factory=lasting_socket)
        self._session = aiohttp.ClientSession(headers=self._headers, timeout=self._timeout, connector=connector)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._looking is not None:
            self._looking.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def answer(
        self, probes: Sequence[Probe], rank: int | None = None, *, priority: int | None = None
    ) -> list[Reading]:
        """One reading a probe, see `probes.Answerer`.

        Args:
            priority: below 0 for work that nobody waits for; for servers that know it only (`ServerFacts.priorities`).
        """
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
        if priority is not None:
            body["priority"] = priority
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
        limit = _QUESTION_SECONDS if body is None else _TEXT_SECONDS if path in ("/tokenize", "/detokenize") else None
        try:
            async with asyncio.timeout(limit):
                return await self._persist(method, path, body)
        except TimeoutError:
            raise ServerError(
                f"{self.url}: {method} {path} was not answered within {limit:g} s. Something is "
                "there: is it the server you mean, and are all its ranks alive?"
            ) from None

    async def _persist(self, method: str, path: str, body: bytes | None) -> Any:
        """Asks until there is an answer or no hope of one."""
        reason = ""
        attempt, wait = 0, 0.0
        while attempt < _RETRIES:
            await asyncio.sleep(wait)
            attempt, wait = attempt + 1, _FIRST_WAIT_SECONDS * 2**attempt
            try:
                answer = await self._watched(method, path, body)
            except (aiohttp.ClientError, TimeoutError) as error:
                reason = f"{self.url}: {method} {path}: {error or type(error).__name__}; is the server running there?"
                # Where nobody has ever answered and packets are lost, more tries are as long as the first.
                if self._heard is None and isinstance(error, aiohttp.ConnectionTimeoutError):
                    break
                continue
            if answer.status == 200:
                try:
                    return orjson.loads(answer.raw)
                except orjson.JSONDecodeError as error:
                    raise ServerError(
                        f"{self.url}: {method} {path}: not JSON: {answer.raw[:200]!r}; is it a server of SGLang's kind?"
                    ) from error
            reason = f"{self.url}: {path} answered {answer.status}: {answer.raw[:500].decode(errors='replace')}"
            final = answer.status == 500 and _FINAL in answer.raw
            if answer.status not in _TRY_AGAIN or final:
                if 400 <= answer.status < 500 or final:
                    rejected = RejectedError(reason)
                    rejected.status = answer.status
                    raise rejected
                break
            if answer.again is not None:
                wait = min(answer.again, _LONGEST_WAIT_SECONDS)
                # The key's rate is used up: it comes back, however long that takes.
                attempt -= answer.status == 429
        raise ServerError(reason)

    async def _watched(self, method: str, path: str, body: bytes | None) -> _Answer:
        """One try; while it lasts, the server is looked after."""
        request = asyncio.ensure_future(self._once(method, path, body))
        try:
            while not (await asyncio.wait((request,), timeout=_LOOK_SECONDS))[0]:
                await self._look(path)
            return request.result()
        finally:
            request.cancel()

    async def _once(self, method: str, path: str, body: bytes | None, limit: float | None = None) -> _Answer:
        if self._session is None:
            raise ServerError("the client is closed; use it in an async with")
        headers = {"Content-Type": "application/json"}
        async with (
            asyncio.timeout(limit),
            self._session.request(method, self.url + path, data=body, headers=headers) as response,
        ):
            raw = await response.read()
        self._heard = time.monotonic()
        return _Answer(response.status, raw, _seconds(response.headers.get("Retry-After")))

    async def _look(self, path: str) -> None:
        """Returns if the server has answered anything of late, be it an error. All who wait for answers look as one.

        Raises:
            ServerError: it answers nothing at all.
        """
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._is_there())
        if not await asyncio.shield(self._looking):
            raise ServerError(
                f"{self.url}: {path} is not answered, nor is /model_info, {_LOOKS} times within "
                f"{_QUESTION_SECONDS:g} s: the server has stopped, or the way to it is cut"
            )

    async def _is_there(self) -> bool:
        for _ in range(_LOOKS):
            if self._heard is not None and time.monotonic() - self._heard < _LOOK_SECONDS:
                return True
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await self._once("GET", "/model_info", None, _QUESTION_SECONDS)
                return True
        return False


class Behind:
    """A server for work that waits for others' (`probes.Answerer`): every request says so.

    Args:
        client: the server, which knows priorities (`ServerFacts.priorities`).
    """

    def __init__(self, client: GenerateClient) -> None:
        self._client = client
        self._priority: int | None = BEHIND

    async def answer(self, probes: Sequence[Probe], rank: int | None = None) -> list[Reading]:
        """See `probes.Answerer`."""
        try:
            return await self._client.answer(probes, rank, priority=self._priority)
        except ServerError as error:
            # One of a router's workers may be a stock server that refuses priorities; the router cannot say.
            if self._priority is None or "without a priority" not in str(error):
                raise
            self._priority = None
            return await self._client.answer(probes, rank)


def _seconds(retry_after: str | None) -> float | None:
    # The header may hold a date, too, which no server of ours writes.
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else None


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
