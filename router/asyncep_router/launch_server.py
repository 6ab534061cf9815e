"""`python -m asyncep_router.launch_server --model-path …`: servers and the router in front of them, together.

Flags named `--router-…` are the router's; `--host` and `--port` are where it listens; all others go to every
server as they are. By default there is one server, `asyncep serve`, whose `--dp-size` ranks share one copy of
the experts and are all seen by the router.

`--api-key` and `--admin-api-key` hold for the router and the servers alike, unless the router is given its own by
`--router-…`; with `--api-key-file`, the router knows the clients and the servers the router. `asyncep serve` gets keys
in its environment, so that `ps` does not show them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from asyncep_router.errors import ConfigError
from asyncep_router.http.flags import add_flags, key_flags, read_flags
from asyncep_router.http.options import RouterOptions
from asyncep_router.http.serve import run
from asyncep_router.keys import key_from
from asyncep_router.process_title import hide_keys

logger = logging.getLogger("asyncep_router")

_COMMANDS = {
    "asyncep": ("-m", "asyncep", "serve"),
    "sglang": ("-m", "sglang.launch_server"),
}
_KEY, _ADMIN_KEY = "ASYNCEP_API_KEY", "ASYNCEP_ADMIN_API_KEY"
_LOCAL = "127.0.0.1"
_LAST_PORT = 65535
_STOP_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class LaunchOptions:
    """The router's settings, and the command line of every server with what is added to its environment."""

    router: RouterOptions
    commands: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def parse(arguments: Sequence[str]) -> LaunchOptions:
    """Split a command line. Raises `ConfigError`."""
    parser = argparse.ArgumentParser(
        prog="asyncep_router.launch_server",
        description="SGLang servers and the router together. Other flags go to the servers.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default=_LOCAL, help="where the router listens (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=30000, help="its port (default 30000)")
    parser.add_argument("--model-path", "--model", required=True, help="the model")
    parser.add_argument("--router-workers", type=int, default=1, help="servers to start (default 1)")
    parser.add_argument("--router-worker-command", choices=sorted(_COMMANDS), default="asyncep", help="what serves")
    parser.add_argument(
        "--router-dp-worker-base-port", type=int, default=31000, help="port of the first server (default 31000)"
    )
    parser.add_argument("--api-key", help=f"key of clients, of router and servers; @FILE: its first line ({_KEY})")
    parser.add_argument("--admin-api-key", help=f"the same for control endpoints ({_ADMIN_KEY})")
    parser.add_argument("--api-key-file", help="keys of several clients of the router")
    add_flags(parser, "router-", frozenset({"worker_urls", "host", "port", "model_path"}))
    known, others = parser.parse_known_args(arguments)
    stray = [flag for flag in others if flag.startswith("--router-")]
    if stray:
        raise ConfigError(f"{stray[0]}: no such flag of the router")
    if known.router_workers < 1:
        raise ConfigError(f"--router-workers {known.router_workers}: must be at least 1")
    first, last = known.router_dp_worker_base_port, known.router_dp_worker_base_port + known.router_workers - 1
    if not 1 <= first <= last <= _LAST_PORT:
        raise ConfigError(f"--router-dp-worker-base-port {first}: ports {first} to {last} must lie in 1 to 65535")
    key, admin_key = key_from(known.api_key, _KEY), key_from(known.admin_api_key, _ADMIN_KEY)
    # The servers, which only the router talks to, need not know the clients of a key file.
    server_key = secrets.token_hex(32) if known.api_key_file and key is None else key
    stock = known.router_worker_command == "sglang"
    named = (("--api-key", _KEY, server_key), ("--admin-api-key", _ADMIN_KEY, admin_key))
    # Stock SGLang takes keys on its command line only.
    own = [word for flag, _, value in named if stock and value is not None for word in (flag, value)]
    environment = {} if stock else {name: value for _, name, value in named if value is not None}
    ports = range(first, last + 1)
    commands = tuple(
        (
            *_COMMANDS[known.router_worker_command],
            *("--model-path", known.model_path, "--host", _LOCAL, "--port", str(port)),
            *own,
            *others,
        )
        for port in ports
    )
    urls = tuple(f"http://{_LOCAL}:{port}" for port in ports)
    settings = read_flags(
        known,
        "router-",
        host=known.host,
        port=known.port,
        api_key=key,
        admin_api_key=admin_key,
        api_key_file=known.api_key_file,
        worker_api_key=server_key,
        worker_admin_api_key=admin_key,
    )
    return LaunchOptions(replace(settings, worker_urls=urls), commands, environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped, or until the last server is gone (status 1)."""
    logging.basicConfig(format="asyncep_router: %(message)s")
    if arguments is None:
        hide_keys(["--api-key", "--admin-api-key", *key_flags("router-")])
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        print(f"asyncep_router: {error}", file=sys.stderr)
        return 2
    servers = [_spawn(command, options.environment) for command in options.commands]
    try:
        return run(options.router, lambda: _watch(servers))
    finally:
        _stop(servers)


def _spawn(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Its own process group, so that Ctrl-C reaches the router alone, which then stops the servers in order."""
    return subprocess.Popen(
        [sys.executable, *command],
        start_new_session=True,
        preexec_fn=_die_with_parent,
        env={**os.environ, **environment},
    )


def _die_with_parent() -> None:
    # Should this process be killed, the kernel tells the server to stop: nothing is left behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def _watch(servers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Return when the last server has ended. The router sees to it that others take over meanwhile."""

    async def ended(server: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        descriptor = os.pidfd_open(server.pid)  # readable once the process has ended
        loop.add_reader(descriptor, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        logger.error("server %d ended with status %s", server.pid, server.poll())

    await asyncio.gather(*(ended(server) for server in servers))


def _stop(servers: Sequence[subprocess.Popen[bytes]]) -> None:
    for server in servers:
        if server.poll() is None:
            server.terminate()
    for server in servers:
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
