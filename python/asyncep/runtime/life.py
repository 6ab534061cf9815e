"""What a runtime lives on: a server of its own or another's, and the session with it, from a start to an end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from asyncep.client.address import server_url
from asyncep.client.errors import OptionError, ServerError
from asyncep.client.scorer import Totals
from asyncep.local_server import StartError, how_it_ended, local_server
from asyncep.runtime.flags import flags_of, in_python, key_of, without_password
from asyncep.runtime.loop import LoopThread
from asyncep.tasks.arguments import checked_types
from asyncep.tasks.session import Session, open_session

# Arguments with a key, and the variable that `asyncep serve` reads it from.
_KEYS = {"api_key": "ASYNCEP_API_KEY", "admin_api_key": "ASYNCEP_ADMIN_API_KEY"}


class Life:
    """The part of `Runtime` that starts and ends; see there."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        dp_size: int = 1,
        *,
        start_seconds: float = 600,
        show_start: bool = True,
        **options: Any,
    ) -> None:
        if not isinstance(model, str | os.PathLike) or not str(model).strip():
            raise OptionError(f"model: a checkpoint's folder or a hub name is needed, not {model!r}")
        checked_types(**{name: (options.get(name), str | None) for name in _KEYS})
        checked_types(dp_size=(dp_size, int), start_seconds=(start_seconds, float), show_start=(show_start, bool))
        if dp_size < 1:
            raise OptionError(f"dp_size: at least one rank is needed, not {dp_size}")
        self._model: str | None = str(model)
        self._show_start = show_start
        self._ranks = dp_size
        self._process: subprocess.Popen[bytes] | None = None
        # Keys go by the environment: anybody on the host can read a command line.
        keys = {variable: key_of(name, options.pop(name, None), variable) for name, variable in _KEYS.items()}
        self._environment = {variable: key for variable, key in keys.items() if key}
        self._flags = ["--dp-size", str(dp_size), *flags_of({"log_level": "warning", **options})]
        self._start_seconds = start_seconds
        # A server of this process' own has the certificate that it was given here.
        self._certificate: str | None = options.get("ssl_certfile")
        self._url: str | None = None
        self._api_key: str | None = keys["ASYNCEP_API_KEY"]
        self._stack: contextlib.ExitStack | None = None
        self._loop: LoopThread | None = None
        self._session: Session | None = None

    @classmethod
    def connect(cls, url: str, *, api_key: str | None = None) -> Self:
        """A runtime on a server that runs already: ``asyncep serve``, our HTTP router, or stock SGLang.

        Args:
            url: such as ``http://127.0.0.1:30000``; without a scheme it is ``http``.
            api_key: the server's key, or ``@FILE`` whose first line it is; by default that of ``$ASYNCEP_API_KEY``.

        A connection has 10 s to come about and a question about the server 30 s to be answered; work has no limit, but
        a server that says nothing any more is given up. Calls of more than 64 texts, and files, wait on servers of ours
        for requests of others (`docs/use/clients.md`).

        Raises:
            OptionError: the URL is none.

        Example:
            >>> with Runtime.connect(runtime.url) as other:
            ...     len(other.tokenize(["one text", "another"]))
            2
        """
        checked_types(api_key=(api_key, str | None))
        runtime = cls("a server that runs already", 1)
        runtime._model, runtime._url = None, server_url(url)
        runtime._api_key = key_of("api_key", api_key, "ASYNCEP_API_KEY")
        return runtime

    def start(self) -> Self:
        """Starts the ranks, or finds the server.

        Raises:
            StartError: the ranks did not come up; says why.
            ServerError: no server at the URL.
            RuntimeError: it is started already.
        """
        if self._stack is not None:
            raise RuntimeError("this runtime is started already")
        with contextlib.ExitStack() as stack:
            if self._model is not None:
                began = time.monotonic()
                self._show(f"starting {self._model} with {self._ranks} rank(s) …")
                own = local_server(
                    self._model,
                    self._flags,
                    start_seconds=self._start_seconds,
                    environment=self._environment,
                    on_wait=lambda seconds, line: self._show(f"still starting after {seconds:.0f} s: {line}"),
                    on_start=self._take,
                )
                try:
                    self._url = stack.enter_context(own)
                except StartError as error:
                    raise StartError(in_python(str(error))) from error
                self._show(f"ready after {time.monotonic() - began:.0f} s at {self._url}")
            loop = LoopThread(self._explained)
            stack.callback(loop.stop)
            opened = open_session(self._url or "", api_key=self._api_key, certificate=self._certificate)
            self._session = loop.run(opened.__aenter__())
            stack.callback(lambda: loop.run(opened.__aexit__(None, None, None)))
            self._loop = loop
            self._stack = stack.pop_all()
        # A program that ends without closing it leaves nothing behind, and says nothing.
        atexit.register(self.close)
        return self

    def close(self) -> None:
        """Ends what `start` began; the ranks stop. A second call does nothing."""
        atexit.unregister(self.close)
        if self._stack is not None:
            stack, self._stack = self._stack, None
            self._session = None
            stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.start)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        if self._model is not None:
            what = f"Runtime({self._model!r})"
        else:
            what = f"Runtime.connect({without_password(self._url)!r})"
        return f"<{what}, {'started' if self._stack is not None else 'not started'}>"

    def _show(self, line: str) -> None:
        if self._show_start:
            print(f"asyncep: {line}", file=sys.stderr, flush=True)

    def _take(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def _explained(self, error: Exception) -> Exception:
        """A server that is gone because it was killed is named."""
        ended = how_it_ended(self._process) if self._process is not None and isinstance(error, ServerError) else ""
        return ServerError(f"{ended}; start a new Runtime. {error}") if ended else error

    @property
    def url(self) -> str:
        """Where its server answers; other clients may use it too."""
        if self._url is None or self._stack is None:
            raise RuntimeError("the runtime is not started; use it in a with statement")
        return self._url

    @property
    def totals(self) -> Totals:
        """What was computed since the start: prompts, tokens, tokens from the prefix cache, FLOPs."""
        return self._need()[0].scorer.totals

    def _need(self) -> tuple[Session, LoopThread]:
        if self._session is None or self._loop is None:
            raise RuntimeError("the runtime is not started; use it in a with statement")
        return self._session, self._loop
