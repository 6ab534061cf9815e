"""One built model of each variant for all tests here, from the cache that the demo itself uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asyncep.demo.build import build_demo_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def sparse_model() -> Path:
    return build_demo_model(variant="sparse")


@pytest.fixture(scope="session")
def exact_model() -> Path:
    return build_demo_model(variant="exact")
