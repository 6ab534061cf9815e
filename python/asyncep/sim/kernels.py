"""Seconds of one layer of a batch on one device: attention half and expert half.

    products        FLOPs / (peak · e(rows) · w / (w + narrow)), at least the weights' bytes / memory bandwidth
    experts         the same with rows per expert; by the curve's form, n rows over E experts cost as n + E · half
    attention       pairs' FLOPs / (bf16 peak · e(length)), each sequence at its own length
    glue            norms, residuals, rotary, quantisation, permuting and activating: bytes / (memory bandwidth · glue)

Glue moves, per token and layer, `DENSE_PASSES` · hidden and, in a sparse layer, `EXPERT_PASSES` · k · hidden and
`WIDTH_PASSES` · k · expert width elements of 2 bytes (assumed; unfused operators move more).
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncep.sim.hardware import Device
from asyncep.sim.work import Batch, LayerKind, Model

DENSE_PASSES = 12
EXPERT_PASSES = 4
WIDTH_PASSES = 3
ACTIVATION_BYTES = 2


@dataclass(frozen=True)
class Kernels:
    """A model on a device. Raises `DataError` if the device has no figures for the model's data type."""

    device: Device
    model: Model

    def __post_init__(self) -> None:
        self.device.check_dtype(self.model.dtype)

    def attention(self, index: int, batch: Batch, split: int = 1) -> float:
        """Seconds of the attention half (projections, attention, dense or shared MLP, glue) of a layer of kind
        `index`, its weights split `split` ways over devices. All tokens pass through every one of them."""
        kind, device = self.model.kinds[index], self.device
        if not batch.tokens:
            return 0.0
        width = self.model.hidden
        seconds = self._product(
            kind.dense_flops * batch.tokens / split, batch.tokens, width / split, kind.dense_bytes / split
        )
        curve, peak = device.attention, device.peak["bf16"]
        seconds += (batch.pairs[index] + curve.half * batch.pairs_by_length[index]) / (curve.top * peak * split)
        # Norms and residuals are repeated on every device that shares the layer.
        seconds += self._glue(DENSE_PASSES * self.model.hidden * batch.tokens)
        return seconds + device.layer_seconds / 2

    def experts(self, index: int, rows: float, experts: float, split: int = 1) -> float:
        """Seconds of the expert half: `rows` (token, expert) pairs over `experts` experts, each expert's width split
        `split` ways. 0 for a dense layer."""
        kind, device = self.model.kinds[index], self.device
        mlp = kind.shape.mlp
        if not mlp.experts or rows <= 0:
            return 0.0
        curve = device.gemm[self.model.dtype]
        width = mlp.expert_width / split
        per_row = (
            kind.expert_flops / mlp.top_k / split / (device.peak[self.model.dtype] * curve.top * self._wide(width))
        )
        used = experts * (1 - (1 - 1 / experts) ** rows) if experts > 1 else experts
        compute = per_row * (rows + used * curve.half)
        read = kind.expert_bytes / mlp.experts * used / split / device.memory_bandwidth
        glue = self._glue((EXPERT_PASSES * self.model.hidden + WIDTH_PASSES * width) * rows)
        return max(compute, read) + glue + device.layer_seconds / 2

    def whole_layer(self, index: int, batch: Batch) -> tuple[float, float]:
        """(attention half, expert half) of a batch on a device that has everything it needs."""
        mlp = self.model.kinds[index].shape.mlp
        return self.attention(index, batch), self.experts(index, batch.tokens * mlp.top_k, mlp.experts)

    def head(self, batch: Batch, split: int = 1) -> float:
        """Seconds of the language-model head and of what a batch costs once."""
        flops = self.model.cost.head_flops * batch.logits / split
        size = self.model.hidden * self.model.cost.shape.vocab * self.model.itemsize / split
        return self._product(flops, batch.logits, self.model.hidden, size) + self.device.step_seconds

    def bound(self, batch: Batch) -> float:
        """Seconds below which no execution of the batch on one device can be: all FLOPs at the higher peak."""
        return batch.flops / max(self.device.peak.values())

    def _product(self, flops: float, rows: float, width: float, weight_bytes: float) -> float:
        if flops <= 0:
            return 0.0
        device, dtype = self.device, self.model.dtype
        rate = device.peak[dtype] * device.gemm[dtype].at(rows) * self._wide(width)
        return max(flops / rate, weight_bytes / device.memory_bandwidth)

    def _wide(self, width: float) -> float:
        return width / (width + self.device.narrow)

    def _glue(self, elements: float) -> float:
        return elements * ACTIVATION_BYTES / (self.device.memory_bandwidth * self.device.glue)


def layer_of(kinds: tuple[LayerKind, ...], sparse: bool) -> int | None:
    """Index of the first kind that is (not) sparse."""
    return next((i for i, kind in enumerate(kinds) if bool(kind.shape.mlp.experts) == sparse), None)
