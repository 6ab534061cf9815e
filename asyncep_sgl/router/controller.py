"""The router inside the engine: takes the place of SGLang's data-parallel controller, with the same messages.

Upstream's controller sends each request on as it comes and polls without sleeping. This one keeps requests until the
policy has a rank for them, hears from the ranks what became of them, starts a dead rank again, and sleeps otherwise.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenizedGenerateReqInput,
    ContinueGenerationReqInput,
    FlushCacheReqInput,
    PauseGenerationReqInput,
    TokenizedGenerateReqInput,
    sock_recv,
    sock_send,
    unwrap_from_pickle,
    wrap_as_pickle,
)
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.observability.req_time_stats import DPControllerReqTimeStats
from sglang.srt.runtime_context import get_model, get_schedule
from sglang.srt.utils.network import get_zmq_socket
from typing_extensions import override

from asyncep_router.cost import ModelCost
from asyncep_router.durations import Durations
from asyncep_router.errors import DuplicateRequestError, UnknownRankError
from asyncep_router.kv_events import decode_batch
from asyncep_router.long_lived import settle
from asyncep_router.messages import BatchReport, Dispatch, Request
from asyncep_router.radix import new_view
from asyncep_router.routing_policy import RoutingPolicy
from asyncep_sgl.config.model_support import read_config
from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.process.zmq_end import for_own_user
from asyncep_sgl.router import marks
from asyncep_sgl.router.fingerprints import fingerprint
from asyncep_sgl.router.limits import limits_of
from asyncep_sgl.router.rank_life import RankLife
from asyncep_sgl.router.rank_order import ranks_take_orders, urgency
from asyncep_sgl.router.state import HEALTH
from asyncep_sgl.router.suspects import Suspects
from asyncep_sgl.router.wire import Beat, Finished, Started, Threshold, decode
from asyncep_sgl.strategies import registry

logger = logging.getLogger(__name__)
decisions = logging.getLogger("asyncep.decisions")

# Requests taken from the tokenizer before the policy is asked: company that has already arrived is seen together.
_GULP = 256
# Upstream's watchdog wants to be fed even when nothing happens, and silent ranks make no event.
_LONGEST_SLEEP_SECONDS = 1.0
# Between looks at whether a rank that is back has connected.
_UNTIL_CONNECTED_SECONDS = 0.01
# Each priority in use costs every decision a little; beyond these they count as these.
_MOST_PRIORITY = 10


class RouterController(RankLife):
    """SGLang's controller with the policy of `asyncep_router` in place of its own.

    One thread owns the policy and the sockets.
    """

    def __init__(self, server_args: Any, port_args: Any, *args: Any, **kwargs: Any) -> None:
        config = AsyncEPConfig.from_environment()
        if config is None or config.router is None:
            raise RuntimeError("the router was installed without a configuration")
        self.config, self.strategy = config, registry.of(config)
        self._decision_seconds = Durations()
        self._submit_seconds = 0.0  # spent on requests that came since the last dispatch
        super().__init__(server_args, port_args, *args, **kwargs)

        self._to_tokenizer = get_zmq_socket(self.context, zmq.PUSH, port_args.tokenizer_ipc_name, False)
        self._reports = self.context.socket(zmq.PULL)
        self._reports.set_hwm(0)
        for_own_user(self._reports)
        self._reports.bind(config.router.report_address)
        self._state = self.context.socket(zmq.REP)
        self._state.linger = 0
        for_own_user(self._state)
        self._state.bind(config.router.state_address)

        cost = ModelCost.from_config(read_config(get_model().model_path, get_model().revision))
        limits = limits_of(
            cost,
            tokens=config.settings.threshold_tokens,
            max_wait=config.router.max_wait_seconds,
            gathers=self.strategy.gathers,
            on_gpu=config.transport != "host",
            chunk_tokens=get_schedule().chunked_prefill_size or 0,
            ranks_let_pass=ranks_take_orders(server_args),
        )
        # Twice what all ranks can hold: prefixes under way count as held before they are.
        budget = 2 * self.launch_dp_size * self.max_total_num_tokens
        self.policy = RoutingPolicy(cost, new_view(budget, get_schedule().page_size or 1), limits)
        self.suspects = Suspects(self.policy, self._answer_aborted, fingerprint)
        for rank in range(self.launch_dp_size):
            self._join(rank)
        for readable in (self.recv_from_tokenizer, self._reports, self._state, self._wake_read):
            self._poller.register(readable, zmq.POLLIN)
        for rank, process in self._processes.items():
            self._watch(rank, process)

    # --- requests -----------------------------------------------------------------------------------------------

    @override
    def dispatching_with_trace(self, req: Any, refresh_load_budget: bool = True) -> None:
        """A tokenized request has come: into the policy with it, or on its way if it only asks for a sign of life."""
        del refresh_load_budget
        whose = marks.taken_off(req)
        if is_health_check_generate_req(req):
            self._send_health_check(req)
            return
        if self.suspects.refused(req, time.monotonic()):
            return
        request = Request(
            rid=req.rid,
            token_ids=req.input_ids,
            arrival=time.monotonic(),
            logits=_logit_positions(req),
            priority=max(-_MOST_PRIORITY, min(_MOST_PRIORITY, getattr(req, "priority", None) or 0)),
            pinned=getattr(req, "routed_dp_rank", None),
            namespace=_namespace(req),
            payload=req,
            client=whose.client,
            flow=whose.flow,
            company=whose.company,
        )
        started = time.perf_counter()
        try:
            self.policy.submit(request, request.arrival)
        except (DuplicateRequestError, UnknownRankError) as error:
            self._answer_aborted(req.rid, str(error), 400)
        self._submit_seconds += time.perf_counter() - started

    def _send_health_check(self, req: Any) -> None:
        """To the rank with the least to do, so that the answer says something about the server, not its queue."""
        for rank in sorted(self.ranks_serving(), key=lambda r: self.policy.ledger.account(r).outstanding):
            if self._tell(rank, req):
                return

    def _send(self, dispatches: Sequence[Dispatch]) -> None:
        """What goes to a rank in one turn goes as one message: the rank sees it at once, for its next batch."""
        for rank, company in itertools.groupby(sorted(dispatches, key=_rank_of), _rank_of):
            sent = list(company)
            if len(self.policy.requests_in_flight(rank)) == len(sent):
                self._vigil.moved(rank)  # it had nothing to do until now
            self._send_to(rank, sent)

    def _send_to(self, rank: int, dispatches: Sequence[Dispatch]) -> None:
        requests = [dispatch.request.payload for dispatch in dispatches]
        times = []
        for req in requests:
            stats = DPControllerReqTimeStats.new_from_obj(unwrap_from_pickle(req.time_stats))
            stats.set_dp_dispatch_time()
            times.append(stats)
            req.time_stats = wrap_as_pickle(stats)
        if self.policy.limits.ranks_let_pass:
            for dispatch in dispatches:
                dispatch.request.payload.priority = urgency(dispatch.request.priority, dispatch.bulk)
        if len(requests) > 1 and all(isinstance(req, TokenizedGenerateReqInput) for req in requests):
            told = len(requests) if self._tell(rank, BatchTokenizedGenerateReqInput(batch=requests)) else 0
        else:
            told = len(list(itertools.takewhile(lambda req: self._tell(rank, req), requests)))
        for req, stats in zip(requests, times, strict=True):
            req.time_stats = stats
            stats.set_dp_dispatch_finish_time()
        if told < len(requests):
            # It has died and its end has not been read yet; the next turn of the loop takes everything back.
            for dispatch in dispatches[told:]:
                self.policy.send_back(dispatch.rid)
            self.policy.set_accepting(rank, False)
        if self.config.router is not None and self.config.router.log_decisions:
            for dispatch in dispatches[:told]:
                decisions.info("%s", json.dumps(_decision(dispatch)))

    @override
    def send_control_message(self, obj: Any) -> None:
        """Everything that is no request goes to all ranks; what concerns waiting requests is also done here."""
        if isinstance(obj, AbortReq):
            withdrawn, forward = self.suspects.abort(obj.rid or "", obj.abort_all)
            for rid in withdrawn:
                self._answer_aborted(rid, "Abort in waiting queue", None)
            if not forward:
                return
        elif isinstance(obj, FlushCacheReqInput):
            for rank in range(self.launch_dp_size):
                self.policy.cache_cleared(rank)
        elif isinstance(obj, PauseGenerationReqInput | ContinueGenerationReqInput):
            self._paused = isinstance(obj, PauseGenerationReqInput)
        for rank in self._active_workers:
            self._tell(rank, obj)

    @override
    def send_to_all_workers(self, obj: Any) -> None:
        """What SGLang sends to all ranks by another way than `send_control_message`."""
        self.send_control_message(obj)

    def _answer_aborted(self, rid: str, message: str, status: int | None) -> None:
        """Tells the tokenizer that a request has ended here, so that its client does not wait."""
        reason: dict[str, Any] = {"type": "abort", "message": message}
        if status is not None:
            reason.update(status_code=status, err_type="BadRequestError" if status < 500 else "InternalServerError")
        sock_send(self._to_tokenizer, AbortReq(rid=rid, finished_reason=reason, abort_message=message))

    # --- the loop -----------------------------------------------------------------------------------------------

    @override
    def event_loop(self) -> None:
        """Hears, decides, sends; sleeps when there is nothing of it."""
        settle()
        while True:
            self.soft_watchdog.feed()
            now = time.monotonic()
            ready = dict(self._poller.poll(math.ceil(self._sleep_seconds(now) * 1000)))
            now = time.monotonic()
            self._vigil.look(now)
            # Reports before deaths: what a rank finished before it died need not be computed again.
            self._take_reports(now)
            for rank, process in list(self._processes.items()):
                if process.sentinel in ready:
                    self._rank_died(rank, now)
            if self._wake_read in ready:
                self._take_posts(now)
            self._end_stuck_ranks()
            self._send_probes()
            self._take_requests()
            self._send(self.suspects.step(self.ranks_serving(), now))
            self._send(self._decide())
            if self._state in ready:
                self._answer_question()

    def _answer_question(self) -> None:
        """Somebody asks for the state or for health; ZeroMQ also wakes for what it then drops as no question."""
        try:
            asked = self._state.recv_multipart(zmq.NOBLOCK)[-1]
        except zmq.Again:
            return
        self._state.send(json.dumps(self.health() if asked == HEALTH else self.state()).encode())

    def _sleep_seconds(self, now: float) -> float:
        if not all(self._probing.values()):
            return _UNTIL_CONNECTED_SECONDS
        wakeups = (self.policy.next_wakeup(now), self.suspects.next_wakeup(now))
        sleeps = [max(0.0, wakeup - now) for wakeup in wakeups if wakeup is not None]
        return min([_LONGEST_SLEEP_SECONDS, *sleeps])

    def _decide(self) -> list[Dispatch]:
        """What is to be sent now. A turn's decisions count as equally long: requests that came in it are filed, and
        those that leave in it, whenever they came, are placed."""
        started = time.perf_counter()
        dispatches = self.policy.poll(time.monotonic())
        if dispatches:
            seconds = self._submit_seconds + time.perf_counter() - started
            self._decision_seconds.observe(seconds / len(dispatches), len(dispatches))
            self._submit_seconds = 0.0
        return dispatches

    def _take_requests(self) -> None:
        taken = 0
        while taken < _GULP:
            try:
                received = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                return
            taken += len(getattr(received, "batch", (received,)))
            self._request_dispatcher(received)

    def _take_reports(self, now: float) -> None:
        while True:
            try:
                message = decode(self._reports.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            except msgspec.MsgspecError as error:
                logger.warning("what is no report has come where ranks report: %s", error)
                continue
            if isinstance(message, Finished):
                if message.rank not in self._probing:  # one token says nothing about its speed
                    self.policy.report(
                        BatchReport(message.rank, message.rids, message.flops, message.seconds, message.cached), now
                    )
                self.suspects.batch_finished(message.rank, message.batch, message.rids)
                self._computed(message.rank)
            elif isinstance(message, Started):
                self.suspects.batch_started(message.rank, message.batch, message.rids)
            elif isinstance(message, Beat):
                self._beat(message.rank, message.pid)
            elif isinstance(message, Threshold):
                # Less is too small to compute well, however fast its gathers are.
                floor = self.policy.cost.threshold_per_layer(self.policy.limits.least_batch)
                self.policy.set_threshold(message.rank, max(message.layer_flops, floor))
            else:
                for event in decode_batch(message.payload).events:
                    self.policy.apply_event(message.rank, event)

    def health(self) -> dict[str, Any]:
        """Whether ranks live and move, for ``GET /health``."""
        return {
            "serving": [[rank, self._restarted[rank]] for rank in self.ranks_serving()],
            "starting": sorted({*self._starting, *self._probing}),
            "silent_seconds": {rank: self._vigil.silent_for(rank) for rank in self.ranks_serving()},
        }

    def state(self) -> dict[str, Any]:
        """What the policy knows, for ``GET /router/state``."""
        found = self.policy.snapshot()
        found["alive"] = [bool(self.status[rank]) for rank in range(self.launch_dp_size)]
        found["suspects"] = self.suspects.quarantine.waiting
        found["quarantined"] = self.suspects.condemned
        found["restarts"] = [self._restarted[rank] for rank in range(self.launch_dp_size)]
        found["decision_seconds"] = self._decision_seconds.snapshot()
        # For a router in front, which has one figure for when a rank is full and for what it is given.
        lowest = min(rank["batch_flops"] for rank in found["ranks"].values())
        found["threshold_flops_per_layer"] = self.policy.cost.threshold_per_layer(lowest)
        return found


def _rank_of(dispatch: Dispatch) -> int:
    return dispatch.rank


def _logit_positions(req: Any) -> int:
    """Positions of the prompt whose logits are computed."""
    start = getattr(req, "logprob_start_len", -1)
    if not getattr(req, "return_logprob", False) or start is None or start < 0:
        return 1
    return max(1, len(req.input_ids) - start)


def _namespace(req: Any) -> str | None:
    """Prompts of different adapters or salts share no cache."""
    parts = [str(part) for part in (getattr(req, "lora_id", None), getattr(req, "extra_key", None)) if part]
    return "|".join(parts) or None


def _decision(dispatch: Dispatch) -> dict[str, Any]:
    return {
        "rid": dispatch.rid,
        "rank": dispatch.rank,
        "reason": dispatch.reason.value,
        "tokens": len(dispatch.request.token_ids),
        "cached_tokens": dispatch.cached,
        "flops": dispatch.flops,
        "waited_s": round(dispatch.waited, 6),
    }
