"""ZeroMQ's sockets as this project needs them: for this user's processes only, and ended in the order that it needs."""

from __future__ import annotations

import os
import weakref
from typing import Any

import zmq


def ends_with(owner: object, context: zmq.Context[Any], sockets: list[zmq.Socket[Any]]) -> weakref.finalize[..., Any]:
    """Closes ``sockets`` and then ``context`` once ``owner`` is gone, or when what is returned is called.

    The garbage collector knows no order: where all three are garbage together, the context may come first. It then
    waits for its sockets for ever, in whatever thread the collector happened to run.

    Args:
        sockets: of ``context``; may change until then.
    """
    end = weakref.finalize(owner, _end, context, sockets)
    # A process that ends closes them anyhow, and must not wait for another thread's.
    end.atexit = False
    return end


def for_own_user(socket: zmq.Socket[Any]) -> None:
    """Lets only this user's processes speak to the Unix sockets that ``socket`` binds from now on.

    The folder they lie in keeps others out already; this holds where somebody opens it.
    """
    socket.setsockopt(zmq.IPC_FILTER_UID, os.geteuid())


def _end(context: zmq.Context[Any], sockets: list[zmq.Socket[Any]]) -> None:
    for socket in sockets:
        socket.close(linger=0)
    context.term()
