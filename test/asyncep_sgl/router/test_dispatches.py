"""What the router inside the engine puts on a rank's line, over real ZeroMQ, in SGLang's own messages."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import zmq
from sglang.srt.managers import io_struct
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from asyncep_router.config import Limits
from asyncep_router.messages import Dispatch, Reason, Request
from asyncep_sgl.router.controller import RouterController


def dispatch(rid: str, rank: int, *, bulk: bool = False) -> Dispatch:
    payload = io_struct.TokenizedGenerateReqInput(
        rid=rid, input_text=None, input_ids=array("q", [5, 6, 7]), input_embeds=None, mm_inputs=None,
        token_type_ids=None, sampling_params=SamplingParams(max_new_tokens=0), return_logprob=False,
        logprob_start_len=-1, top_logprobs_num=0, token_ids_logprob=None, stream=False,
    )  # fmt: skip
    payload.time_stats = io_struct.wrap_as_pickle(APIServerReqTimeStats())
    request = Request(rid, payload.input_ids, 0.0, payload=payload)
    return Dispatch(rid, rank, Reason.FILL, 0, 1, 0.0, request, bulk)


def test_what_goes_to_a_rank_in_one_turn_is_one_message_in_order() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as zero, context.socket(zmq.PULL) as one:
        pushes: list[Any] = []
        for name, pull in (("zero", zero), ("one", one)):
            pull.bind(f"inproc://{name}")
            push = context.socket(zmq.PUSH)
            push.connect(f"inproc://{name}")
            pushes.append(push)
        controller = RouterController.__new__(RouterController)  # its sockets and no ranks
        controller.workers, controller.status = pushes, [True, True]
        controller.config = SimpleNamespace(router=None)
        controller.policy = SimpleNamespace(
            requests_in_flight=lambda _rank: ["another"] * 9, limits=Limits(ranks_let_pass=True)
        )
        turn = [dispatch("a", 1), dispatch("b", 0), dispatch("c", 1, bulk=True), dispatch("d", 1)]
        try:
            controller._send(turn)
            company = io_struct.sock_recv(one)
            assert isinstance(company, io_struct.BatchTokenizedGenerateReqInput)
            assert [each.rid for each in company] == ["a", "c", "d"]
            assert [each.priority for each in company] == [0, -1, 0]  # bulk is passed by the others
            assert io_struct.sock_recv(zero).rid == "b"
            assert not zero.poll(100)
            assert not one.poll(100)
            # Should the rank die, the same requests go to another: they must still be fit to be sent.
            controller._send(turn)
            assert len(io_struct.sock_recv(one)) == 3
        finally:
            for push in pushes:
                push.close(0)
