"""The router's settings: whatever a flag is given, it is refused by its name or a router can be made of it."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import Any

import pytest

from asyncep_router.errors import ConfigError
from asyncep_router.http.options import RouterOptions
from asyncep_router.http.router import Router

FIELDS = {each.name: each.default for each in fields(RouterOptions)}
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
    taken = [made(**{name: value}) for value in (FLOATS if isinstance(FIELDS[name], float) else INTEGERS)]
    assert any(taken), "nothing is taken"
    assert not all(taken), "no bound at all"


@pytest.mark.parametrize("name", ["worker_urls", "trusted_worker_urls"])
@pytest.mark.parametrize("url", URLS)
def test_a_url_is_refused_by_its_flag_or_serves(name: str, url: str) -> None:
    made(**{name: (url,)})


def test_a_url_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--worker-urls: http://a:1 stands there twice"):
        RouterOptions(worker_urls=("http://a:1", "http://a:1/"))
