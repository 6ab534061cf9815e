"""A rank without a model: takes SGLang's requests off its socket and reports each batch done at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import zmq
from sglang.srt.managers.io_struct import BatchTokenizedGenerateReqInput, TokenizedGenerateReqInput, sock_recv
from sglang.srt.runtime_context import get_model, publish
from sglang.srt.utils.network import get_zmq_socket

from asyncep_router.cost import ModelCost
from asyncep_sgl.config.model_support import read_config
from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.rank.reports import RankReporter, start_beating

CACHE_TOKENS = 4_000_000
_MOST_IN_A_BATCH = 64


@dataclass
class _Done:
    """What a report needs of one of SGLang's requests."""

    rid: str
    cached_tokens: int = 0

    def finished(self) -> bool:
        return True


@dataclass
class _Batch:
    """What a report needs of one of SGLang's batches."""

    reqs: list[_Done]
    extend_lens: list[int]
    prefix_lens: list[int]
    forward_iter: int = 0


def run(server_args: Any, port_args: Any, _gpu: int, _tp: int, _pp: int, rank: int, ready: Any, *_: Any) -> None:
    """In the place of SGLang's `run_scheduler_process`; ends with the controller that started it."""
    config = AsyncEPConfig.from_environment()
    if config is None or config.router is None:
        raise RuntimeError("a null rank is started by bench/router_inside.py")
    publish(server_args, role="scheduler")
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, set(cpus[1:]) or set(cpus))
    context = zmq.Context(1)
    requests = get_zmq_socket(context, zmq.PULL, port_args.scheduler_input_ipc_name, False)
    clients = get_zmq_socket(context, zmq.PUSH, port_args.tokenizer_ipc_name, False)
    cost = ModelCost.from_config(read_config(get_model().model_path, get_model().revision))
    reporter = RankReporter(rank, config.router.report_address, cost)
    start_beating(rank, config.router.report_address)
    ready.send({"status": "ready", "max_total_num_tokens": CACHE_TOKENS, "max_req_input_len": CACHE_TOKENS})
    parent = os.getppid()
    while os.getppid() == parent:
        if not requests.poll(1000):
            continue
        batch: list[Any] = []
        while len(batch) < _MOST_IN_A_BATCH:
            try:
                message = sock_recv(requests, zmq.NOBLOCK)
            except zmq.Again:
                break
            batch += message if isinstance(message, BatchTokenizedGenerateReqInput) else [message]
        batch = [each for each in batch if isinstance(each, TokenizedGenerateReqInput)]
        lengths = [len(each.input_ids) for each in batch]
        reporter.batch_done(_Batch([_Done(each.rid) for each in batch], lengths, [0] * len(batch)), 1e-3)
        clients.send(len(batch).to_bytes(4, "little"))
