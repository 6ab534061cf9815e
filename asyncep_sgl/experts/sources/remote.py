"""Experts of other hosts: one-sided reads by NIXL. Their owners' Python has no part in it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from asyncep_sgl.errors import GatherError
from asyncep_sgl.experts.group.nixl_agent import make_agent


class Copy(NamedTuple):
    """``nbytes`` from ``source`` in the peer's memory to ``target`` in this process's."""

    source: int
    target: int
    nbytes: int


class PeerLostError(GatherError):
    """The connection to a peer broke."""


class Read:
    """One request under way to one peer, over the connection of that number."""

    def __init__(self, agent: Any, lock: threading.RLock, handle: Any, connection: int) -> None:
        self.connection = connection
        self._agent = agent
        self._lock = lock
        self._handle = handle
        self._done = False

    def done(self) -> bool:
        """Whether all bytes are there.

        Raises:
            PeerLostError: they will not come.
        """
        if self._done:
            return True
        with self._lock:
            try:
                state = self._agent.check_xfer_state(self._handle)
            except Exception as error:
                raise PeerLostError(f"a read broke off: {error}") from error
            if state == "ERR":
                raise PeerLostError("a read failed")
            if state == "DONE":
                self._done = True
                self._handle.release()
            return self._done

    def over(self) -> bool:
        """Whether nothing writes any more: the read has ended, one way or the other."""
        try:
            return self.done()
        except PeerLostError:
            self._done = True
            return True

    def abandon(self) -> None:
        """Returns when nothing writes any more."""
        while not self.over():
            time.sleep(0.001)


class RemoteReader:
    """This rank's side of every connection to other hosts' exporters. One thread asks, another may look after reads."""

    def __init__(self, name: str) -> None:
        # NIXL's agents are for one thread at a time.
        self._lock = threading.RLock()
        self._agent = make_agent(name)
        self._peers: dict[int, str] = {}
        self._connections: Counter[int] = Counter()

    def register(self, memory: torch.Tensor) -> None:
        """Memory that reads may write to, from now on."""
        self._agent.register_memory([(memory.data_ptr(), memory.nbytes, 0, "")], "DRAM")

    def connect(self, node: int, agent: bytes) -> None:
        """Makes a peer's memory readable. ``agent``: as its exporter described itself."""
        self.forget(node)
        with self._lock:
            name = self._agent.add_remote_agent(agent)
        self._peers[node] = name.decode() if isinstance(name, bytes) else name
        self._connections[node] += 1

    def connection(self, node: int) -> int:
        """How often ``node`` has been connected to."""
        return self._connections[node]

    def forget(self, node: int) -> None:
        """Breaks the connection to a peer; its reads under way fail."""
        if node in self._peers:
            with self._lock:
                self._agent.remove_remote_agent(self._peers.pop(node))

    def read(self, node: int, copies: Iterable[Copy]) -> Read:
        """Asks ``node`` for bytes; returns at once.

        Raises:
            PeerLostError: not connected, or no longer.
        """
        if node not in self._peers:
            raise PeerLostError(f"no connection to node {node}")
        wanted = list(copies)
        with self._lock:
            local = self._agent.get_xfer_descs([(copy.target, copy.nbytes, 0) for copy in wanted], "DRAM")
            remote = self._agent.get_xfer_descs([(copy.source, copy.nbytes, 0) for copy in wanted], "DRAM")
            try:
                handle = self._agent.initialize_xfer("READ", local, remote, self._peers[node])
                self._agent.transfer(handle)
            except Exception as error:
                raise PeerLostError(f"node {node} cannot be read: {error}") from error
        return Read(self._agent, self._lock, handle, self._connections[node])
