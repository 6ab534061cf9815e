"""What the front says of another process of the server that does not answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asyncep_sgl.errors import StoreError
from asyncep_sgl.front.server import _or_503


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError("the router did not answer in 5000 ms"), "the router did not answer in 5000 ms"),
        (StoreError("no answer at ipc://run/store"), "the launcher does not answer"),
    ],
)
def test_a_silent_process_is_a_503_that_says_which(error: Exception, words: str) -> None:
    def ask() -> dict[str, Any]:
        raise error

    answer = _or_503(ask)
    assert not isinstance(answer, dict)
    assert answer.status_code == 503
    assert json.loads(answer.body)["error"]["message"] == words
    assert int(answer.headers["retry-after"]) >= 1


def test_an_answer_is_passed_on() -> None:
    assert _or_503(lambda: {"pending": 4}) == {"pending": 4}
