"""The ranks' processes, as the router keeps them: started, watched, ended when they are stuck, started again."""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq
from sglang.srt.managers import data_parallel_controller
from sglang.srt.managers.data_parallel_controller import DataParallelController
from sglang.srt.managers.io_struct import sock_send
from sglang.srt.runtime_context import get_memory
from typing_extensions import override

from asyncep_sgl.config.run import AsyncEPConfig
from asyncep_sgl.experts.store.client import StoreClient
from asyncep_sgl.experts.store.messages import Done, Failed
from asyncep_sgl.process.prefork import PreforkContext, reap_orphans, template_pids
from asyncep_sgl.process.state import ProcessState, process_state, stuck
from asyncep_sgl.router.probe import probe
from asyncep_sgl.router.vigil import Vigil

if TYPE_CHECKING:
    from asyncep_router.routing_policy import RoutingPolicy
    from asyncep_sgl.router.suspects import Suspects
    from asyncep_sgl.strategies.base import Strategy

logger = logging.getLogger(__name__)


class _ProcessList(list[Any]):
    """Upstream appends a rank's process in the thread that starts it; ranks start in parallel, so tell by thread."""

    def __init__(self, started: Callable[[int, Any], None]) -> None:
        super().__init__()
        self._started = started

    def append(self, process: Any) -> None:
        super().append(process)
        self._started(threading.get_ident(), process)


class RankLife(DataParallelController):  # type: ignore[misc] # upstream is untyped
    """SGLang's controller with ranks that may die.

    The thread of the loop owns all of this. Ranks are started by threads of their own, which only post to it.
    """

    config: AsyncEPConfig
    strategy: Strategy
    policy: RoutingPolicy
    suspects: Suspects

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._rank_port_args: dict[int, Any] = {}
        self._processes: dict[int, Any] = {}
        self._starting: dict[int, Any] = {}
        self._rank_of_thread: dict[int, int] = {}
        self._process_of_thread: dict[int, Any] = {}
        # Ranks that are back and have been asked for a pass, or are to be: they get requests once it is done.
        self._probing: dict[int, bool] = {}
        self._restarted: collections.Counter[int] = collections.Counter()
        self._vigil = Vigil()
        self._looks: dict[int, tuple[ProcessState, float]] = {}
        # Ranks that are ended because somebody has stopped them, which no request can do.
        self._stopped: set[int] = set()
        # An operator has stopped all work; nothing moves, and nobody is stuck.
        self._paused = False
        # Threads that start ranks post here and wake the loop.
        self._posts: collections.deque[tuple[str, int, Any]] = collections.deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        super().__init__(*args, **kwargs)
        self._posts.clear()

    @override
    def launch_tensor_parallel_group(
        self, server_args: Any, port_args: Any, base_gpu_id: int, dp_rank: int, worker_ports: Any = None
    ) -> None:
        """Starts one rank and returns when it is ready (upstream's), keeping what is needed to start it again."""
        self._rank_port_args[dp_rank] = (server_args, port_args, base_gpu_id)
        self._rank_of_thread[threading.get_ident()] = dp_rank
        super().launch_tensor_parallel_group(server_args, port_args, base_gpu_id, dp_rank, worker_ports)
        self._processes[dp_rank] = self._process_of_thread.pop(threading.get_ident())

    def _process_started(self, thread: int, process: Any) -> None:
        self._process_of_thread[thread] = process
        self._post("started", self._rank_of_thread[thread], process)

    @override
    def launch_dp_schedulers(self, server_args: Any, port_args: Any) -> None:
        """Starts all ranks in parallel (upstream's)."""
        self.scheduler_procs = _ProcessList(self._process_started)
        if not isinstance(data_parallel_controller.mp, PreforkContext):
            # Where nothing is forked ahead: a rank that dies while it starts is noticed with this one only.
            data_parallel_controller.mp = PreforkContext()
        super().launch_dp_schedulers(server_args, port_args)

    def _watch(self, rank: int, process: Any) -> None:
        self._processes[rank] = process
        self._starting.pop(rank, None)
        self._poller.register(process.sentinel, zmq.POLLIN)
        if rank not in self._vigil:
            self._vigil.started(rank)

    def _join(self, rank: int) -> None:
        self.status[rank] = True
        self._refresh_active_workers()
        self.policy.rank_joined(
            rank,
            caches=not get_memory().disable_radix_cache,
            cache_tokens=self.max_total_num_tokens,
            gathers=self.strategy.gathers,
        )
        self._vigil.moved(rank)

    def _tell(self, rank: int, message: Any) -> bool:
        """Sends a rank a message; False if it is not there. Never waits: a rank may die at any moment, and a socket
        whose only peer is gone would hold the router for good."""
        try:
            sock_send(self.workers[rank], message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def ranks_serving(self) -> list[int]:
        """Those that take requests."""
        return [rank for rank in range(self.launch_dp_size) if self.status[rank]]

    # --- deaths -------------------------------------------------------------------------------------------------

    def _rank_died(self, rank: int, now: float) -> None:
        process = self._processes.pop(rank)
        self._poller.unregister(process.sentinel)
        self._gone(rank, process)
        self.status[rank] = False
        self._refresh_active_workers()
        if self._probing.pop(rank, None) is not None:
            self.suspects.rank_ended_starting(rank, now)
            returned = 0
        elif rank in self._stopped:
            returned = self.suspects.stopped_rank_died(rank, now)
        else:
            returned = self.suspects.rank_died(rank, now)
        self._stopped.discard(rank)
        logger.warning(
            "rank %d ended with status %s; %d requests go elsewhere, the rank is started again",
            rank,
            process.exitcode,
            returned,
        )
        self._start_again(rank)

    def _gone(self, rank: int, process: Any) -> None:
        """A rank's process has ended."""
        process.join()
        with contextlib.suppress(ValueError):
            self.scheduler_procs.remove(process)
        self._vigil.ended(rank)
        self._looks.pop(rank, None)
        # What a rank started and did not end became this process's child.
        known = {process.pid for process in self.scheduler_procs}
        reap_orphans(known | template_pids())

    def _start_again(self, rank: int) -> None:
        reason = self.suspects.deaths.verdict(rank)
        if reason is not None:
            self._give_up(reason)
        threading.Thread(target=self._restart, args=(rank,), name=f"restart-rank-{rank}", daemon=True).start()

    def _restart(self, rank: int) -> None:
        """Runs in a thread, for good: a rank that was not forked ends with the thread that started it."""
        server_args, port_args, base_gpu_id = self._rank_port_args[rank]
        try:
            self.launch_tensor_parallel_group(server_args, port_args, base_gpu_id, rank)
        except Exception as error:
            process = self._process_of_thread.pop(threading.get_ident(), None)
            self._post("failed", rank, (process, f"{type(error).__name__}: {error}"))
            return
        self._post("ready", rank, None)
        threading.Event().wait()

    def _post(self, what: str, rank: int, detail: Any) -> None:
        self._posts.append((what, rank, detail))
        os.write(self._wake_write, b"x")

    def _take_posts(self, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        while self._posts:
            what, rank, detail = self._posts.popleft()
            if what == "started":
                self._starting[rank] = detail
                self._vigil.started(rank)
                continue
            if what == "ready":
                self._watch(rank, self._processes[rank])
                self._probing[rank] = False
                continue
            process, reason = detail
            # It died while starting: its process is not watched yet.
            if process is not None:
                process.join()
                reason = f"it ended with status {process.exitcode} ({reason})"
                self._gone(rank, process)
            self._starting.pop(rank, None)
            self._stopped.discard(rank)
            logger.warning("rank %d could not be started again: %s", rank, reason)
            self.suspects.rank_ended_starting(rank, now)
            self._start_again(rank)

    def _give_up(self, reason: str) -> None:
        """Ends the server with a reason; upstream turns the exception into the end of every process."""
        line = StoreClient(self.config.store_address)
        line.ask(Failed(-1, reason), Done, patience=1.0)
        line.close()
        raise RuntimeError(reason)

    # --- ranks that are back ------------------------------------------------------------------------------------

    def _send_probes(self) -> None:
        """A rank that is back computes one token before it gets requests: if it cannot, no request is why."""
        for rank, sent in list(self._probing.items()):
            if not sent:
                self._probing[rank] = self._tell(rank, probe(embeds=self.server_args.is_embedding))

    def _computed(self, rank: int) -> None:
        """A rank has reported a batch."""
        self._vigil.moved(rank)
        if self._probing.pop(rank, None) is not None:
            self._restarted[rank] += 1
            self._join(rank)
            logger.warning("rank %d is back", rank)

    # --- ranks that do nothing ----------------------------------------------------------------------------------

    def _beat(self, rank: int, pid: int) -> None:
        """A rank's process lives. One that has died in the meantime is not meant."""
        process = self._starting.get(rank) or self._processes.get(rank)
        if process is not None and process.pid == pid:
            self._vigil.beat(rank)

    def _end_stuck_ranks(self) -> None:
        """Ends what has been silent for too long, or has not moved for far longer than its work takes."""
        for rank, process in [*self._processes.items(), *self._starting.items()]:
            quiet, limit = self._vigil.silent_for(rank), self._vigil.limit(rank)
            if quiet < limit / 2:
                self._looks.pop(rank, None)
            elif (state := process_state(process.pid)) is not None:
                before, since = self._looks.setdefault(rank, (state, quiet))
                if quiet < limit or quiet - since < limit / 2:
                    continue
                if stuck(before, state):
                    if state.stopped:
                        self._stopped.add(rank)
                    self._end(rank, process.pid, f"has not been heard for {quiet:.0f} s")
                else:
                    # It computes without leaving the interpreter to its other threads, or has no processor.
                    self._looks[rank] = (state, quiet)
        for rank, process in list(self._processes.items()) if self._moves_count() else ():
            if self._has_work(rank) and self._vigil.stalled(rank, self._expected_seconds(rank)):
                self._end(rank, process.pid, "has not finished a batch for far longer than it should take")

    def _moves_count(self) -> bool:
        return not self._paused and not self.strategy.may_stall

    def _has_work(self, rank: int) -> bool:
        return rank in self._probing or bool(self.policy.requests_in_flight(rank))

    def _expected_seconds(self, rank: int) -> float | None:
        account = self.policy.ledger.account(rank)
        return account.outstanding / account.flops_per_second if account.flops_per_second else None

    def _end(self, rank: int, pid: int, why: str) -> None:
        logger.error("rank %d (process %d) %s; it is killed", rank, pid, why)
        self._looks.pop(rank, None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
