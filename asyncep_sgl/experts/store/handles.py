"""Descriptors of device memory in the launcher's keeping: ranks hand them in, and take copies out.

A Unix socket beside the store's ZeroMQ one, since only those carry descriptors. The launcher never looks into the
memory; that it holds the descriptors is what lets experts outlive a rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import struct
import threading

import msgspec

from asyncep_router.frames import decoded
from asyncep_sgl.errors import StoreError

logger = logging.getLogger(__name__)

_LARGEST = 4096
_PATIENCE_SECONDS = 30.0


class _Ask(msgspec.Struct):
    key: str
    deposit: bool
    nbytes: int = 0


class _Answer(msgspec.Struct):
    nbytes: int = -1
    refused: str = ""


def handles_address(store_address: str) -> str:
    """Where the keeper beside a store listens: in the same private folder."""
    return store_address.removeprefix("ipc://") + "-handles"


class HandleKeeper:
    """The launcher's side: a thread that keeps one descriptor a key until `close`."""

    def __init__(self, store_address: str) -> None:
        # A descriptor for each tensor of each layer and rank; the usual soft limit is 1,024.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._kept: dict[str, tuple[int, int]] = {}
        self._address = handles_address(store_address)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(self._address)
        self._socket.listen(64)
        self._thread = threading.Thread(target=self._serve, name="asyncep-handles", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(nbytes for _, nbytes in list(self._kept.values()))

    def close(self) -> None:
        """Lets go of everything."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)
        self._thread.join()
        for descriptor, _ in self._kept.values():
            os.close(descriptor)
        self._kept.clear()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                return
            with line:
                line.settimeout(_PATIENCE_SECONDS)
                try:
                    self._answer(line)
                except (OSError, msgspec.MsgspecError) as error:
                    logger.warning("a request for device memory broke off: %s", error)

    def _answer(self, line: socket.socket) -> None:
        credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, user, _ = struct.unpack("3i", credentials)
        data, descriptors, _, _ = socket.recv_fds(line, _LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return
        answer, given = _Answer(), []
        try:
            ask = decoded(msgspec.msgpack.Decoder(_Ask), data)
            if user != os.getuid():
                answer.refused = "device memory is given to the launcher's own user only"
            elif ask.deposit:
                self._keep(ask, descriptors, answer)
            elif ask.key in self._kept:
                descriptor, answer.nbytes = self._kept[ask.key]
                given = [descriptor]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        socket.send_fds(line, [msgspec.msgpack.encode(answer)], given)

    def _keep(self, ask: _Ask, descriptors: list[int], answer: _Answer) -> None:
        if len(descriptors) != 1:
            answer.refused = f"{ask.key}: {len(descriptors)} descriptors handed in, want one"
            return
        before = self._kept.pop(ask.key, None)
        if before is not None:
            # Its maker died before its shard was whole, and starts over.
            os.close(before[0])
        self._kept[ask.key] = (descriptors.pop(), ask.nbytes)
        answer.nbytes = ask.nbytes


class HandleClient:
    """A rank's side. A connection a question: they are few, and all at the start."""

    def __init__(self, store_address: str) -> None:
        self._address = handles_address(store_address)

    def deposit(self, key: str, descriptor: int, nbytes: int) -> None:
        """Hands a descriptor in; the caller may close its own.

        Raises:
            StoreError: refused, or nobody there.
        """
        self._ask(_Ask(key, True, nbytes), [descriptor])

    def withdraw(self, key: str) -> tuple[int, int] | None:
        """A descriptor, the caller's to close, and its bytes; None if nobody handed one in.

        Raises:
            StoreError: refused, or nobody there.
        """
        answer, descriptors = self._ask(_Ask(key, False), [])
        return (descriptors[0], answer.nbytes) if descriptors else None

    def _ask(self, ask: _Ask, descriptors: list[int]) -> tuple[_Answer, list[int]]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
                line.settimeout(_PATIENCE_SECONDS)
                line.connect(self._address)
                socket.send_fds(line, [msgspec.msgpack.encode(ask)], descriptors)
                data, given, _, _ = socket.recv_fds(line, _LARGEST, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise StoreError(f"the launcher does not keep device memory: {error}; is it stopped?") from error
        if not data:
            raise StoreError("the launcher gave no answer about device memory; see its log")
        answer = msgspec.msgpack.decode(data, type=_Answer)
        if answer.refused:
            raise StoreError(answer.refused)
        return answer, given
