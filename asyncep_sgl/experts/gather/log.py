"""What a rank's gathers came to, batch by batch: sums for the report, a line a batch for those who ask."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from asyncep_sgl.experts.gather.pipeline import LayerTrace
from asyncep_sgl.experts.gather.window import WindowModel, nearness, peak_threshold
from asyncep_sgl.experts.store.messages import GatherReport

logger = logging.getLogger("asyncep.gathers")

# A batch's gathers move t_EP by this share of the difference.
_LEARN = 0.25


@dataclass
class GatherBook:
    """The books of one rank. Pure but for the log.

    Attributes:
        rank: whose.
        layers: decoder layers of the model; a batch's FLOPs are divided evenly over them.
        gathered: layers that gather.
        bytes_per_layer: what the largest gathers.
        seconds: t_EP as measured at start-up, and followed since.
        peak: FLOPs a second of a large matrix product on this rank.
        margin: gamma.
        log: write a JSON line for each batch.
    """

    rank: int
    layers: int
    gathered: int
    bytes_per_layer: int
    seconds: float
    peak: float
    margin: float
    log: bool
    window: WindowModel = field(default_factory=WindowModel)
    batches: int = 0
    exposed: float = 0.0
    steps: float = 0.0

    def batch(self, trace: Sequence[LayerTrace], flops: float, seconds: float, target: float) -> None:
        """A batch of ``flops`` (all layers) took ``seconds``; it had been cut at ``target`` FLOPs."""
        if not trace:
            return
        self.batches += 1
        self.exposed += sum(entry.exposed for entry in trace)
        self.steps += seconds
        windows = [entry.window for entry in trace if entry.window is not None]
        if windows and flops > 0:
            window = statistics.fmean(windows)
            self.window.add(flops / self.layers, window, nearness(window, self.seconds))
        gathers = [entry.gather for entry in trace if entry.gather]
        if told := [gather.seconds for gather in gathers if gather.exact or gather.seconds < self.seconds]:
            # Their mean: two that are under way at once may share the link and end together, one after twice its time
            # and the other at once. What met a moment's trouble counts as twice as slow, however slow it was.
            mean = min(2 * self.seconds, max(self.seconds / 2, statistics.fmean(told)))
            self.seconds += _LEARN * (mean - self.seconds)
        if self.log:
            line = {
                "event": "gather",
                "rank": self.rank,
                "flops": flops,
                "target_flops": target,
                "step_s": round(seconds, 6),
                "exposed_s": [round(entry.exposed, 6) for entry in trace],
                "window_s": [None if entry.window is None else round(entry.window, 6) for entry in trace],
                "gather_s": [None if entry.gather is None else round(entry.gather.seconds, 6) for entry in trace],
            }
            logger.info("%s", json.dumps(line))

    def report(self, digest_failures: int, peer_losses: int) -> GatherReport:
        """For the launcher and whoever asks it."""
        fixed, per_flop = self.window.line()
        return GatherReport(
            rank=self.rank,
            layers=self.gathered,
            bytes_per_layer=self.bytes_per_layer,
            seconds=self.seconds,
            gemm_flops_per_second=self.peak,
            window_fixed=fixed,
            window_per_flop=per_flop,
            saturation_flops=self.window.saturation(self.seconds),
            threshold_flops=self.threshold(),
            peak_threshold_flops=peak_threshold(self.seconds, self.peak, self.margin),
            batches=self.batches,
            exposed_seconds=self.exposed,
            step_seconds=self.steps,
            digest_failures=digest_failures,
            peer_losses=peer_losses,
        )

    def threshold(self) -> float:
        """T, in FLOPs a layer: as measured, or after the paper until batches near it have been measured."""
        measured = self.window.saturation(self.seconds * self.margin) if self.window.known else None
        return peak_threshold(self.seconds, self.peak, self.margin) if measured is None else measured
