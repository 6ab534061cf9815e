"""The router's settings: whatever a flag is given, it is refused by its name or a router can be made of it."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import fields
from typing import Any

import pytest

from asyncep_router.errors import ConfigError
from asyncep_router.http.options import RouterOptions
from asyncep_router.http.router import Router
from asyncep_router.launch_server import parse as parse_launch

FIELDS = {each.name: each.default for each in fields(RouterOptions)}
BOUNDS = {each.name: each.metadata for each in fields(RouterOptions)}
NUMBERS = [name for name, value in FIELDS.items() if isinstance(value, int | float) and not isinstance(value, bool)]
INTEGERS: list[Any] = [-(10**400), -(10**30), -2, -1, 0, 1, 65536, 10**9, 10**30, 10**400]
FLOATS: list[Any] = [*INTEGERS[1:-1], -0.5, 0.5, 1.5, float("nan"), float("inf"), float("-inf")]
URLS = ["", "x", "http://", "http://a:99999", "http://a/ b", "ftp://a", "http://u:p@a", "http://a:1", "http://a:1/?x=1"]


def made(**settings: Any) -> bool:
    """Whether a router was made of these; what is refused is refused by the flag's name."""
    refused = ""
    try:
        options = RouterOptions(**settings)
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert refused.startswith(tuple(f"--{name.replace('_', '-')}" for name in settings))
        return False

    async def make() -> None:
        await Router(options).close()

    asyncio.run(make())
    return True


def test_there_are_many() -> None:
    assert len(NUMBERS) > 30


@pytest.mark.parametrize("name", [*NUMBERS, "rate_limit_tokens_per_second"])
def test_a_number_is_refused_by_its_flag_or_serves(name: str) -> None:
    for value in FLOATS if isinstance(FIELDS[name], float) else INTEGERS:
        made(**{name: value})
    assert not made(**{name: -2})
    bounds = BOUNDS[name]
    for bound, beyond in ((bounds["least"], -1), (bounds["most"], 1)):
        if bound is not None:
            assert made(**{name: bound})
            assert not made(**{name: bound + beyond})


def test_no_request_at_all_is_no_limit() -> None:
    assert not made(max_concurrent_requests=0)


@pytest.mark.parametrize("buckets", [(5.0, 1.0), (1.0, 1.0), (float("nan"),), (1.0, float("inf"))])
def test_bounds_of_histograms_rise(buckets: tuple[float, ...]) -> None:
    assert not made(prometheus_duration_buckets=buckets)
    assert made(prometheus_duration_buckets=(0.1, 1.0))


def test_the_longest_time_to_take_an_answer_is_one_that_the_kernel_takes() -> None:
    most = BOUNDS["body_timeout_secs"]["most"]
    with socket.socket() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(most * 1000))


def test_both_commands_name_their_own_flags() -> None:
    line = ["--model-path", "m", "--router-cache-threshold", "5"]
    with pytest.raises(ConfigError, match=r"^--router-cache-threshold 5.0: must be at most 1"):
        parse_launch(line)
    with pytest.raises(ConfigError, match=r"^--port 99999: must be at most"):
        parse_launch(["--model-path", "m", "--port", "99999"])
    with pytest.raises(ConfigError, match=r"^--router-dp-worker-base-port 65535"):
        parse_launch(["--model-path", "m", "--router-dp-worker-base-port", "65535", "--router-workers", "2"])


@pytest.mark.parametrize("name", ["worker_urls", "trusted_worker_urls"])
@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_by_its_flag_or_serves(name: str, url: str) -> None:
    made(**{name: (url,)})


def test_a_url_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--worker-urls: http://a:1 stands there twice"):
        RouterOptions(worker_urls=("http://a:1", "http://a:1/"))
