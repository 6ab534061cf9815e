"""Two hosts on one machine: network namespaces joined by a link of limited rate.

    with two_hosts("760mbit") as hosts:
        subprocess.Popen(hosts.command(0, ["asyncep", "serve", …, "--dist-init-addr", hosts.rendezvous]))

Each host has an address on the link that is measured, and another (`Hosts.url`) that this machine's own processes reach
it by, so that clients' traffic does not take from the link. Needs the right to make namespaces (root, or a container
with CAP_SYS_ADMIN and CAP_NET_ADMIN), `ip` and `tc` (Debian: iproute2).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

NAMES = ("a", "b")


class NoNamespacesError(RuntimeError):
    """This machine cannot emulate hosts; the message says why."""


@dataclass(frozen=True)
class Hosts:
    """Two running namespaces.

    Attributes:
        tag: part of their names, different for each process that makes some.
        subnet: second byte of their addresses, likewise.
    """

    tag: str
    subnet: int

    def address(self, host: int) -> str:
        """On the link between the hosts."""
        return f"10.{self.subnet}.0.{host + 1}"

    def url(self, host: int, port: int) -> str:
        """Where this machine's processes reach a server on ``host``."""
        return f"http://10.{self.subnet}.{host + 1}.2:{port}"

    @property
    def rendezvous(self) -> str:
        """For ``--dist-init-addr``."""
        return f"{self.address(0)}:5000"

    def interface(self, host: int) -> str:
        """The link's end on ``host``."""
        return self._link(host)

    def command(self, host: int, command: Sequence[str], cpus: str | None = None) -> list[str]:
        """``command`` on ``host``, on the given CPUs (as taskset writes them) or on its own one."""
        on = cpus if cpus is not None else str(self.core(host))
        # UCX would find the other host's memory beside it on this machine; the link is what is to be used.
        transport = ["env", "UCX_TLS=tcp", f"UCX_NET_DEVICES={self._link(host)}"]
        return ["ip", "netns", "exec", self._name(host), *transport, "taskset", "-c", on, *command]

    def limit(self, rate: str) -> None:
        """Sets the link's rate in each direction, such as ``760mbit``."""
        for host in (0, 1):
            discipline = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
            _run("tc", "-n", self._name(host), "qdisc", "replace", "dev", self._link(host), *discipline)

    def link(self, up: bool) -> None:
        """Plugs the link in or out."""
        _run("ip", "-n", self._name(1), "link", "set", self._link(1), "up" if up else "down")

    def core(self, host: int) -> int:
        """The CPU that is ``host``'s own."""
        own = sorted(os.sched_getaffinity(0))
        return own[host % len(own)]

    def _receive_on_own_core(self, host: int, interface: str) -> None:
        """Gives ``host`` the work of taking packets in; the sender's core would do it, as nothing is between them."""
        steering = f"/sys/class/net/{interface}/queues/rx-0/rps_cpus"
        mask = f"{1 << self.core(host):x}"
        _run("ip", "netns", "exec", self._name(host), "sh", "-c", f"echo {mask} > {steering}")

    def _name(self, host: int) -> str:
        return f"asyncep-{self.tag}-{NAMES[host]}"

    def _link(self, host: int) -> str:
        return f"ax{self.tag}{NAMES[host]}"

    def make(self) -> None:
        for host in (0, 1):
            name, inside, outside = self._name(host), f"mgmt{host}", f"ax{self.tag}m{host}"
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", name)
            _run("ip", "addr", "add", f"10.{self.subnet}.{host + 1}.1/24", "dev", outside)
            _run("ip", "link", "set", outside, "up")
            _run("ip", "-n", name, "addr", "add", f"10.{self.subnet}.{host + 1}.2/24", "dev", inside)
            _run("ip", "-n", name, "link", "set", inside, "up")
        one, other = self._link(0), self._link(1)
        _run(
            "ip",
            "link",
            "add",
            one,
            "netns",
            self._name(0),
            "type",
            "veth",
            "peer",
            "name",
            other,
            "netns",
            self._name(1),
        )
        for host in (0, 1):
            _run("ip", "-n", self._name(host), "addr", "add", f"{self.address(host)}/24", "dev", self._link(host))
            _run("ip", "-n", self._name(host), "link", "set", self._link(host), "up")
            self._receive_on_own_core(host, self._link(host))

    def remove(self) -> None:
        for host in (0, 1):
            subprocess.run(["ip", "netns", "del", self._name(host)], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"ax{self.tag}m{host}"], capture_output=True, check=False)


@contextmanager
def two_hosts(rate: str) -> Iterator[Hosts]:
    """Two hosts joined by a link of ``rate`` in each direction; gone again afterwards.

    Raises:
        NoNamespacesError: not on this machine.
    """
    for tool in ("ip", "tc", "taskset"):
        if shutil.which(tool) is None:
            raise NoNamespacesError(f"`{tool}` is missing (Debian: apt install iproute2 util-linux)")
    pid = os.getpid()
    hosts = Hosts(f"{pid % 100000}", 64 + pid % 190)
    try:
        try:
            hosts.make()
            hosts.limit(rate)
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode().strip()
            raise NoNamespacesError(f"`{' '.join(error.cmd)}` failed: {words}; network namespaces need root") from error
        yield hosts
    finally:
        hosts.remove()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
