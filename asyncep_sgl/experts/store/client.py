"""A process's line to the owner of the expert store."""

from __future__ import annotations

import logging
import os
import signal
from typing import Literal, TypeVar

import msgspec
import zmq

from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.errors import StoreError
from asyncep_sgl.experts.store.messages import Done, Hello, Refused, Reply, Report, Request, Welcome
from asyncep_sgl.process.lifeline import die_with
from asyncep_sgl.process.zmq_end import ends_with

_Reply = TypeVar("_Reply")

PATIENCE_SECONDS = 30.0
# A rank stands still for so long where the launcher does not take a report, once.
TELL_SECONDS = 1.0


class StoreClient:
    """Asks and waits. Not for use from several threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        context = zmq.Context()
        self._socket = context.socket(zmq.REQ)
        self._end = ends_with(self, context, [self._socket])
        # What could not be delivered must not keep a process from ending.
        self._socket.linger = 0
        self._socket.connect(address)
        self._decoder = msgspec.msgpack.Decoder(Reply)
        self._untaken = False

    def ask(self, request: Request, expect: type[_Reply], patience: float | None = PATIENCE_SECONDS) -> _Reply:
        """Sends ``request`` and returns the reply, which must be an ``expect``.

        Args:
            patience: seconds to wait; None waits as long as the launcher lives.

        Raises:
            StoreError: refused, or no answer in time.
        """
        self.post(request)
        if not self._socket.poll(None if patience is None else int(patience * 1000)):
            raise StoreError(
                f"no answer from the expert store at {self._address} in {patience} s; is the launcher stopped?"
            )
        return self._receive(expect)

    def post(self, request: Request) -> None:
        """Sends ``request`` and goes on; `poll` gets the reply."""
        self._socket.send(msgspec.msgpack.encode(request))

    def poll(self, expect: type[_Reply]) -> _Reply | None:
        """The reply to what was posted, or None if it has not come yet.

        Raises:
            StoreError: refused.
        """
        return self._receive(expect) if self._socket.poll(0) else None

    def tell(self, report: Report, patience: float = TELL_SECONDS) -> bool:
        """Sends a report that a later one replaces: a launcher that is stopped must not keep a rank from computing.

        Args:
            patience: seconds to wait until it is taken.

        Returns:
            Whether it was sent; not while the one before is untaken.

        Raises:
            StoreError: refused.
        """
        if self._untaken and self.poll(Done) is None:
            return False
        self.post(report)
        self._untaken = not self._socket.poll(int(patience * 1000))
        if not self._untaken:
            self._receive(Done)
        return True

    def _receive(self, expect: type[_Reply]) -> _Reply:
        reply = self._decoder.decode(self._socket.recv())
        if isinstance(reply, Refused):
            raise StoreError(reply.reason)
        if not isinstance(reply, expect):
            raise StoreError(f"the expert store answered {type(reply).__name__}, not {expect.__name__}")
        return reply

    def close(self) -> None:
        """Hangs up."""
        self._end()


def ask_once(address: str, request: Request, expect: type[_Reply], patience: float | None = PATIENCE_SECONDS) -> _Reply:
    """One question on a line of its own: a ZeroMQ socket belongs to one thread, and some processes have many.

    Raises:
        StoreError: see `StoreClient.ask`.
    """
    line = StoreClient(address)
    try:
        return line.ask(request, expect, patience)
    finally:
        line.close()


def begin_side_process(role: str) -> tuple[AsyncEPConfig, StoreClient]:
    """What a side process does first: it ends with the launcher, leaves Ctrl-C to it, and says hello.

    Raises:
        StoreError: see `StoreClient.ask`.
    """
    logging.basicConfig(format="asyncep: %(message)s", level=logging.INFO)
    config = AsyncEPConfig.from_environment()
    if config is None:
        raise SystemExit("this module is started by asyncep serve, not by hand")
    die_with(config.launcher_pid, config.run_directory)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    store = StoreClient(config.store_address)
    store.ask(Hello(role, os.getpid()), Welcome)
    return config, store


def say_hello(address: str, role: Literal["front", "controller", "detokenizer"]) -> None:
    """Tells the launcher that this process is there; it is watched from now on.

    Raises:
        StoreError: see `StoreClient.ask`.
    """
    ask_once(address, Hello(role, os.getpid()), Welcome)
