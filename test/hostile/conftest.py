"""The suites' rooms, importable."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
# Last: the names of benches and of test folders are partly the same.
sys.path.append(str(BENCH))


@pytest.fixture(scope="session")
def document() -> dict[str, object]:
    """The OpenAPI document of the installed SGLang."""
    from hostile.schema import sglang_document

    return sglang_document()
