"""What the front says of another process of the server that does not answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncep_sgl.errors import StoreError
from asyncep_sgl.front.server import _or_503


@pytest.mark.parametrize("error", [TimeoutError("the router did not answer in 5000 ms"), StoreError("no launcher")])
def test_a_silent_process_is_a_503_that_says_which(error: Exception) -> None:
    def ask() -> dict[str, Any]:
        raise error

    answer = _or_503(ask)
    assert not isinstance(answer, dict)
    assert answer.status_code == 503
    assert json.loads(answer.body)["error"]["message"] == str(error)


def test_an_answer_is_passed_on() -> None:
    assert _or_503(lambda: {"pending": 4}) == {"pending": 4}
