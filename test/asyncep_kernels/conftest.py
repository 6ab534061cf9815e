"""Every kernel test can be run on each instruction set of this machine: `on_each_isa`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from asyncep_kernels.native import isa, library
from asyncep_kernels.native.isa import Isa


@pytest.fixture
def use_isa(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Isa], None]]:
    """Makes the kernels of one instruction set serve until the test ends; skips what this CPU has not."""
    best = isa.choose()

    def use(wanted: Isa) -> None:
        if list(Isa).index(wanted) < list(Isa).index(best):
            pytest.skip(f"this CPU has no {wanted.value}")
        monkeypatch.setenv(isa.ENVIRONMENT, wanted.value)
        library.library.cache_clear()

    yield use
    monkeypatch.undo()
    library.library.cache_clear()
