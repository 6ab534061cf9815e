"""The store's ear: a ZeroMQ socket in the launcher that carries requests to the registry and replies back."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import msgspec
import zmq

from asyncep_router.frames import decoded
from asyncep_sgl.experts.store.handles import HandleKeeper
from asyncep_sgl.experts.store.messages import Refused, Reply, Request
from asyncep_sgl.experts.store.registry import StoreRegistry
from asyncep_sgl.process.host import available_bytes
from asyncep_sgl.process.segment import OwnedSegment
from asyncep_sgl.process.zmq_end import ends_with, for_own_user

logger = logging.getLogger(__name__)


class StoreServer:
    """Owner of the host's experts. The launcher's loop calls `serve_pending` whenever `descriptor` is readable."""

    def __init__(
        self, ranks: int, limit: int | None = None, *, devices: bool = False, directory: Path | None = None
    ) -> None:
        """Listens in ``directory``.

        Args:
            ranks: that share the experts.
            limit: bytes they may take, or None.
            devices: keeps descriptors of device memory too.
            directory: a folder that no other user can enter; None makes one, which goes with this object. Not an
                abstract address: to those, any user of the machine may speak.
        """
        self._own_directory = tempfile.TemporaryDirectory(prefix="asyncep-store-") if directory is None else None
        folder = Path(self._own_directory.name) if self._own_directory is not None else directory
        self.address = f"ipc://{folder}/store"
        self.registry: StoreRegistry[bytes] = StoreRegistry(ranks, OwnedSegment, available_bytes, limit)
        context = zmq.Context()
        self.socket = context.socket(zmq.ROUTER)
        self._end = ends_with(self, context, [self.socket])
        for_own_user(self.socket)
        self.socket.bind(self.address)
        self._decoder = msgspec.msgpack.Decoder(Request)
        self._handles = HandleKeeper(self.address) if devices else None

    @property
    def descriptor(self) -> int:
        """Becomes readable when there may be something to serve. Edge-triggered, as ZeroMQ's are: serve until empty."""
        descriptor = self.socket.getsockopt(zmq.FD)
        if not isinstance(descriptor, int):
            raise TypeError(f"ZeroMQ gave {descriptor!r} for a descriptor")
        return descriptor

    def serve_pending(self) -> None:
        """Answers everything that has arrived. A request that is not understood is refused, never fatal."""
        while True:
            try:
                client, _, frame = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                continue
            try:
                replies = self.registry.handle(client, decoded(self._decoder, frame))
            except msgspec.MsgspecError as error:
                replies = [(client, Refused(f"the expert store does not understand: {error}"))]
            for address, reply in replies:
                self._send(address, reply)

    def _send(self, address: bytes, reply: Reply) -> None:
        if isinstance(reply, Refused):
            logger.error("expert store: %s", reply.reason)
        self.socket.send_multipart([address, b"", msgspec.msgpack.encode(reply)])

    def close(self) -> None:
        """Ends the conversation and gives the memory back."""
        self._end()
        self.registry.close()
        if self._handles is not None:
            self._handles.close()
        if self._own_directory is not None:
            self._own_directory.cleanup()
