"""Where UCX listens for what the hosts of a group read from each other: on the link alone, as far as it can be told."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from asyncep_sgl.config.run import GroupConfig

_RDMA = Path("/sys/class/infiniband")


def link_environment(rendezvous: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of UCX's for the processes of a host; what the operator has set stays.

    UCX would listen on every interface of the host, and in a socket that any user of it may write to. RDMA devices
    have no such ports, and which of them are the link is the operator's to say.

    Args:
        rendezvous: ``host:port`` of node 0.
        environment: this process's.
    """
    wanted: dict[str, str] = {}
    if "UCX_TLS" not in environment:
        # Shared memory joins no two hosts.
        wanted["UCX_TLS"] = "^sm"
    has_rdma = _RDMA.is_dir() and any(_RDMA.iterdir())
    if "UCX_NET_DEVICES" not in environment and not has_rdma:
        interface = _interface_towards(rendezvous)
        if interface is not None:
            wanted["UCX_NET_DEVICES"] = interface
    return wanted


def link_host(group: GroupConfig) -> str:
    """What this host's processes listen on for the others: its address on the link.

    Raises:
        OSError: there is no way to node 0.
    """
    host, _, port = group.rendezvous.rpartition(":")
    return host if group.node == 0 else address_towards(host, int(port))


def address_towards(host: str, port: int) -> str:
    """This host's address on the way to another. Sends nothing.

    Raises:
        OSError: there is no way.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def _interface_towards(rendezvous: str) -> str | None:
    host, _, port = rendezvous.rpartition(":")
    try:
        own = address_towards(host.strip("[]"), int(port))
    except OSError:
        return None
    interfaces: dict[str, list[Any]] = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(address.address.partition("%")[0] == own for address in addresses):
            return name
    return None
