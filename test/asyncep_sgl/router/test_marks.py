"""What the front says about whose a request is reaches the router, and the ranks don't see it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput

from asyncep_sgl.front.validation import check_priority
from asyncep_sgl.router.marks import Mark, put_on, taken_off


def spread(request: Any) -> list[Any]:
    """The requests that SGLang makes of one."""
    request.normalize_batch_and_arguments()
    return [request] if request.is_single else [request[index] for index in range(len(request.rid))]


@pytest.mark.parametrize("kind", [GenerateReqInput, EmbeddingReqInput])
@pytest.mark.parametrize(
    ("fields", "company"),
    [
        ({"text": "one"}, 1),
        ({"input_ids": [1, 2]}, 1),
        ({"text": ["one"]}, 1),
        ({"text": ["one", "two"]}, 2),
        ({"input_ids": [[1], [2], [3]]}, 3),
    ],
)
def test_every_request_of_a_list_says_how_many_they_are(kind: Any, fields: dict[str, Any], company: int) -> None:
    request = kind(**fields, http_worker_ipc="a client's own")
    put_on(request, "somebody")
    found = [(taken_off(each), each.http_worker_ipc) for each in spread(request)]
    assert len(found) == company
    assert {mark.company for mark, _ in found} == {company}
    assert {mark.client for mark, _ in found} == {"somebody"}
    assert len({mark.flow for mark, _ in found}) == 1
    assert bool(found[0][0].flow) == (company > 1)
    assert {left for _, left in found} == {None}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("prompts", [1, 4])
def test_samples_count(samples: int, prompts: int) -> None:
    request = GenerateReqInput(input_ids=[[1]] * prompts, sampling_params={"n": samples})
    put_on(request, "")
    assert {taken_off(each).company for each in spread(request)} == {samples * prompts}


def test_lists_have_names_of_their_own() -> None:
    flows = set()
    for _ in range(3):
        request = GenerateReqInput(text=["a", "b"])
        put_on(request, "same")
        flows.add(taken_off(request).flow)
    assert len(flows) == 3


@given(st.text())
def test_no_name_of_a_client_spoils_the_mark(client: str) -> None:
    request = GenerateReqInput(text=["a", "b"])
    put_on(request, client)
    mark = taken_off(request)
    assert mark.company == 2
    assert mark.client == client.replace("\x1f", "")


@given(st.one_of(st.none(), st.text()))
@example("\x1f\x1f")
def test_what_is_no_mark_is_nobodys(text: str | None) -> None:
    request = GenerateReqInput(text="a", http_worker_ipc=text)
    assert taken_off(request) == Mark()
    assert request.http_worker_ipc is None


@pytest.mark.parametrize("priority", [1, 9, 2**62])
def test_priorities_above_normal_are_the_administrators(priority: int) -> None:
    with pytest.raises(ValueError, match=r"priority: .*--admin-api-key"):
        check_priority(priority, admin=False)
    check_priority(priority, admin=True)


@pytest.mark.parametrize("priority", [None, 0, -1, -(2**62)])
def test_priorities_below_normal_are_everybodys(priority: int | None) -> None:
    check_priority(priority, admin=False)
