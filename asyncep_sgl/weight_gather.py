"""Our gather in the seam SGLang has for weight gathers (its DWDP), which is otherwise for NVLink only.

SGLang asks the process's manager before and after the experts of each bound layer, and before each forward pass.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.runtime_context import get_model, set_global_dwdp_manager

from asyncep_router.cost import ModelCost
from asyncep_sgl.config import AsyncEPConfig
from asyncep_sgl.experts.client import StoreClient
from asyncep_sgl.experts.gather import Counters, ExpertGather
from asyncep_sgl.experts.gather_log import GatherBook
from asyncep_sgl.experts.gather_start import start_gather
from asyncep_sgl.experts.manager import ExpertManager
from asyncep_sgl.experts.messages import Done
from asyncep_sgl.model_support import local_folder, read_config
from asyncep_sgl.scheduling.flops_batches import adder_class
from asyncep_sgl.scheduling.reports import RankReporter

_REPORT_SECONDS = 1.0
# The first batches are those that T is measured with: each is told at once.
_FIRST_BATCHES = 16


class WeightGather:
    """What SGLang calls a DWDP manager: these four methods."""

    def __init__(self, model: Any, gather: ExpertGather) -> None:
        """Binds every layer of ``model`` that gathers, and takes the manager's place."""
        self._gather = gather
        self._layers: dict[int, Any] = {}
        for module in model.modules():
            if isinstance(module, FusedMoE) and module.layer_id in gather.layers:
                module.bind_full_expert_weights({})
                self._layers[module.layer_id] = module
        set_global_dwdp_manager(self)

    def prefetch_first_layers(self) -> None:
        """A forward pass begins."""
        self._gather.begin()

    def wait_prefetch(self, layer_id: int) -> None:
        """The layer's experts are about to be used: `cpu_operators.around_moe_forward_native` finds their table."""
        self._layers[layer_id].asyncep_experts = self._gather.wait(layer_id)

    def record_compute_and_prefetch_next(self, layer_id: int) -> None:
        """The layer's experts have been used."""
        self._gather.release(layer_id)

    def cleanup(self) -> None:
        """Nothing reads any more."""
        self._gather.pipeline.close()


class RankGather:
    """A rank's gather, its books, and its line to the launcher that passes them on."""

    def __init__(
        self,
        gather: ExpertGather,
        book: GatherBook,
        cost: ModelCost,
        line: StoreClient,
        reporter: RankReporter | None,
        floor_tokens: int,
    ) -> None:
        self._gather = gather
        self._book = book
        self._cost = cost
        self._line = line
        self._reporter = reporter
        self._floor = float(cost.flops(floor_tokens))
        self.prefill_adder = adder_class(cost, self.batch_flops)
        """The class SGLang's scheduler forms this rank's batches with."""
        self._reported = 0.0
        self._told = Counters()
        self._report()

    @classmethod
    def start(
        cls, model: Any, manager: ExpertManager, config: AsyncEPConfig, reporter: RankReporter | None
    ) -> RankGather | None:
        """Makes ``model`` gather what this host does not have; None if it has everything.

        Args:
            reporter: the line to the router inside the engine, if there is one.
        """
        cost = ModelCost.from_config(read_config(get_model().model_path, get_model().revision))
        started = start_gather(
            manager,
            config.group,
            local_folder(get_model().model_path, get_model().revision),
            len(cost.shape.layers),
            config.log_gathers,
            device=None if config.transport == "host" else torch.device("cuda", torch.cuda.current_device()),
        )
        if started is None:
            return None
        gather, book = started
        WeightGather(model, gather)
        return cls(gather, book, cost, manager.client, reporter, config.group.threshold_tokens)

    def batch_flops(self) -> float:
        """What a batch should cost: T, or what computes well where that is more."""
        return max(self._cost.threshold_flops(self._book.threshold()), self._floor)

    def batch_done(self, passes: list[tuple[int, int]], seconds: float) -> None:
        """A batch of (new tokens, cached tokens) a request took ``seconds``."""
        trace = self._gather.take_trace()
        # Read before this batch can change it: batches are formed and computed in turn, so this one was cut at it.
        target = self.batch_flops()
        self._book.batch(trace, float(self._cost.batch_flops(passes)), seconds, target)
        # What went wrong is told at once: the next batch on this rank may be long in coming.
        news = self._gather.counters != self._told or self._book.batches <= _FIRST_BATCHES
        if news or time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._report()

    def _report(self) -> None:
        self._reported = time.monotonic()
        counters = self._told = replace(self._gather.counters)
        if self._reporter is not None:
            self._reporter.threshold(self._book.threshold())
        self._line.ask(self._book.report(counters.digest_failures, counters.peer_losses), Done)
