"""Which runs of `replicated` let idle ranks help, and what is refused."""

from __future__ import annotations

import pytest

from asyncep_sgl.config.run import AsyncEPConfig, GroupConfig
from asyncep_sgl.config.settings import RunSettings
from asyncep_sgl.errors import UsageError
from asyncep_sgl.launcher.command_line import parse
from asyncep_sgl.strategies.replicated import Replicated

APART = ((0,), (1,))


def config(**more: object) -> AsyncEPConfig:
    given = {"ranks": 2, "store_address": "", "launcher_pid": 1, "load_board": "", "cpus": APART, **more}
    return AsyncEPConfig(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("run", "helps"),
    [
        (config(), True),
        (config(settings=RunSettings(idle_ranks="rest")), False),
        (config(settings=RunSettings(kernels="sglang")), False),
        (config(ranks=1, cpus=((0, 1),)), False),
        (config(cpus=((0,), (0,))), False),  # they share a CPU
        (config(ranks=3, cpus=((0,), (1,), (0,))), False),
        (config(transport="pinned", cpus=()), False),
    ],
)
def test_idle_ranks_help_where_each_has_cpus_of_its_own(run: AsyncEPConfig, helps: bool) -> None:
    assert Replicated(run)._helps is helps
    # One helps or none: what /metrics shows says which.
    assert bool(Replicated(run).collectors(lambda: None)) is helps  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("flags", [["--dp-size", "1"], ["--dp-size", "2", "--asyncep-kernels", "sglang"]])
def test_rest_where_nobody_would_help_is_refused(flags: list[str]) -> None:
    options = parse(["--model", "m", *flags, "--asyncep-idle-ranks", "rest"])
    with pytest.raises(UsageError, match="--asyncep-idle-ranks rest: with "):
        Replicated.refuse(options, GroupConfig())
    Replicated.refuse(parse(["--model", "m", *flags]), GroupConfig())
    Replicated.refuse(parse(["--model", "m", "--dp-size", "2", "--asyncep-idle-ranks", "rest"]), GroupConfig())
