"""Running the router: listening, signals, draining, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import ssl
import sys
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web
from prometheus_client import disable_created_metrics

from asyncep_router.errors import ConfigError
from asyncep_router.http.app import App
from asyncep_router.http.connections import LimitedServer
from asyncep_router.http.router import Router
from asyncep_router.long_lived import return_memory, settle

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from asyncep_router.http.options import RouterOptions

logger = logging.getLogger("asyncep_router")

# Ten thousand clients may connect in the same moment; the kernel caps this at net.core.somaxconn.
_BACKLOG = 16384
# A scrape is short: these bounds of the metrics' listener need no flags.
_SCRAPE_CONNECTIONS = 64
_SCRAPE_SECONDS = 10.0
# After the grace period what is left is cut off; this long the cut may take.
_CUT_SECONDS = 1.0
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def run(options: RouterOptions, beside: Callable[[], Awaitable[None]] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, or until `beside` returns. Returns the exit status."""
    logging.basicConfig(format="asyncep_router: %(message)s", stream=sys.stderr)
    logger.setLevel(_LEVELS[options.log_level])
    _raise_file_limit()
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(options, beside))


async def _serve(options: RouterOptions, beside: Callable[[], Awaitable[None]] | None) -> int:
    loop = asyncio.get_running_loop()
    router = Router(options)
    app = App(router)
    server = app.server()
    front = web.ServerRunner(server, access_log=None)
    scraped = LimitedServer(
        _scrape(router),
        most=_SCRAPE_CONNECTIONS,
        header_seconds=_SCRAPE_SECONDS,
        keep_alive=_SCRAPE_SECONDS,
        taking_seconds=_SCRAPE_SECONDS,
    )
    scrape = web.ServerRunner(scraped, access_log=None)
    stop = asyncio.Event()
    try:
        await front.setup()
        site = web.TCPSite(front, options.host, options.port, backlog=_BACKLOG, ssl_context=_tls(options))
        await _start(site, "--port", options.port)
        if options.prometheus_port:
            await scrape.setup()
            metrics_site = web.TCPSite(scrape, options.metrics_host, options.prometheus_port)
            await _start(metrics_site, "--prometheus-port", options.prometheus_port)
        settle()
        return_memory()
        logger.info("listening on %s:%d, policy %s", options.host, options.port, options.policy)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        companion = asyncio.ensure_future(beside()) if beside is not None else None
        if companion is not None:
            companion.add_done_callback(lambda _: stop.set())
        await stop.wait()
        await _drain(app, router, site, stop)
        if companion is not None:
            gone = companion.done() and not companion.cancelled()
            companion.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await companion
            return 1 if gone else 0
        return 0
    except ConfigError as error:
        print(f"asyncep_router: {error}", file=sys.stderr)
        return 2
    finally:
        server.pre_shutdown()
        await server.shutdown(_CUT_SECONDS)
        await front.cleanup()
        await scrape.cleanup()
        await router.close()


async def _drain(app: App, router: Router, site: web.TCPSite, stop: asyncio.Event) -> None:
    """Finish what was received; refuse what comes over open connections; a second signal ends it at once."""
    app.draining = True
    logger.info("draining %d requests", app.answering)
    # New connections are refused by the kernel from here on, so a balancer looks elsewhere.
    await site.stop()
    stop.clear()
    waits = [asyncio.ensure_future(app.quiet.wait()), asyncio.ensure_future(stop.wait())]
    await asyncio.wait(waits, timeout=router.options.shutdown_grace_period_secs, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if app.answering:
        logger.warning("%d requests are cut off", app.answering)


async def _start(site: web.TCPSite, flag: str, port: int) -> None:
    try:
        await site.start()
    except OSError as error:
        raise ConfigError(f"{flag} {port}: {error.strerror or error}") from error


def _scrape(router: Router) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    async def scrape(request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/metrics":
            return web.Response(status=404, text="only /metrics is here\n")
        return web.Response(
            body=router.metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    return scrape


def _tls(options: RouterOptions) -> ssl.SSLContext | None:
    if options.tls_cert_path is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert_path, options.tls_key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--tls-cert-path {options.tls_cert_path}: {error}") from error
    return context


def _raise_file_limit() -> None:
    """Every client and every worker connection is a descriptor."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
