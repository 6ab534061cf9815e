"""A process's line to its host's exporter: who of the group is there."""

from __future__ import annotations

import contextlib

import zmq

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.group.peers import HealthRequest, View, ViewRequest, decode, encode
from asyncep_sgl.process.zmq_end import ends_with


class ViewLine:
    """Asks now and takes the answer later, for who must not wait. Not for use from several threads."""

    def __init__(self, address: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._line = context.socket(zmq.DEALER)
        self._end = ends_with(self, context, [self._line])
        self._line.linger = 0
        # What an exporter that is away has not taken is not worth asking it later.
        self._line.sndhwm = 2
        self._line.connect(address)

    def ask(self) -> None:
        """Who is there? Without descriptors."""
        with contextlib.suppress(zmq.Again):
            self._line.send(encode(HealthRequest()), zmq.NOBLOCK)

    def answer(self, seconds: float = 0.0) -> View | None:
        """The newest answer, waited for so long; None if there is none yet."""
        found = None
        while self._line.poll(0 if found else int(seconds * 1000)):
            message = decode(self._line.recv())
            found = message if isinstance(message, View) else found
        return found

    def close(self) -> None:
        """Hangs up."""
        self._end()


class ViewClient:
    """Asks and waits. Not for use from several threads."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._sockets = [self._connect()]
        self._end = ends_with(self, self._context, self._sockets)

    def view(self, *, descriptors: bool = True) -> View:
        """The other hosts as the exporter sees them now. An exporter that is being restarted is waited for."""
        while True:
            (line,) = self._sockets
            line.send(encode(ViewRequest() if descriptors else HealthRequest()))
            if line.poll(1000):
                break
            line.close()
            self._sockets[:] = [self._connect()]
        answer = decode(line.recv())
        if not isinstance(answer, View):
            raise GatherError(f"the exporter at {self._address} answered {type(answer).__name__}")
        return answer

    def close(self) -> None:
        """Hangs up."""
        self._end()

    def _connect(self) -> zmq.Socket[bytes]:
        line = self._context.socket(zmq.REQ)
        line.linger = 0
        line.connect(self._address)
        return line
