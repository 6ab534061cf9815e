"""Signals: what ends a start, what asks a running server to stop, and what the launcher then tells the front."""

from __future__ import annotations

import contextlib
import signal
import socket

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DRAIN_SIGNAL = signal.SIGUSR1


class Stopped(BaseException):
    """A stop signal came before there was anything to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)


class StopSignals:
    """Notes the signals that come.

    Once `install` has been called a signal raises `Stopped`; from `defer` on it is only noted, and wakes whoever polls
    `descriptor`.
    """

    def __init__(self) -> None:
        self.noted: list[int] = []
        self._deferred = False
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)

    @property
    def descriptor(self) -> int:
        """Readable when a signal has come."""
        return self._read.fileno()

    @property
    def name(self) -> str:
        """Of the first that came."""
        return signal.Signals(self.noted[0]).name

    def install(self) -> None:
        """Takes the signals over. To be called in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def defer(self) -> None:
        """Lets signals be noted only."""
        self._deferred = True
        self.install()
        # Python notes a signal in a flag; the byte it also writes here is what wakes a poll.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)

    def clear(self) -> None:
        """Makes `descriptor` quiet again."""
        with contextlib.suppress(BlockingIOError):
            self._read.recv(64)

    def close(self) -> None:
        """Wakes nobody any more; signals are noted as before."""
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()

    def _note(self, number: int, _frame: object) -> None:
        self.noted.append(number)
        if not self._deferred:
            raise Stopped(number)
