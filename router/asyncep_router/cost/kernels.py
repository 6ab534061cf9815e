"""FLOPs and bytes of each kernel of one MoE layer: the parts that `ModelCost` has the sum of.

A time is the larger of FLOPs over the device's rate and bytes over the memory's: nothing can be faster, and large
GEMMs reach 60 to 80 % of it. Bytes are those that must move once: inputs read, outputs written.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncep_router.cost.devices import Device, Number
from asyncep_router.cost.model import AttentionCounting, ModelCost
from asyncep_router.cost.shape import LayerShape, ModelShape

# Elements of an activation row that share a scale in e4m3, and a scale's bytes.
GROUP = 128
SCALE = 4


@dataclass(frozen=True)
class KernelCost:
    """One launch, or the few launches of one operation."""

    name: str
    flops: float
    """Of matrix products; 0 for kernels that only move."""
    bytes: float
    number: Number
    """What is multiplied."""

    def seconds(self, device: Device) -> float:
        """The least time it can take."""
        return max(self.flops / device.product_rate(self.number), self.bytes / device.memory_bytes)

    def bound(self, device: Device) -> str:
        """Which of the two that is."""
        compute = self.flops / device.product_rate(self.number)
        return "compute" if compute >= self.bytes / device.memory_bytes else "memory"


def moe_kernels(shape: ModelShape, layer: LayerShape, tokens: int, experts: Number) -> tuple[KernelCost, ...]:
    """The kernels of `asyncep_kernels` for one layer's routed experts.

    Args:
        shape: the model.
        layer: one of its sparse layers.
        tokens: of the batch.
        experts: how weights are stored; activations are multiplied in it too.

    Every expert's weights are read once (a batch large enough to touch all of them), routing is even.
    """
    mlp, hidden = layer.mlp, shape.hidden
    assignments = tokens * mlp.top_k
    size = experts.size
    quantised = experts is not Number.BF16
    weights = 3 * hidden * mlp.expert_width * mlp.experts * size
    gated = tokens * hidden * size + assignments * mlp.expert_width * size
    down = assignments * mlp.expert_width * size + assignments * hidden * 2
    costs = [KernelCost("permute", 0, assignments * (8 + 8 + 4 + 4), Number.BF16)]
    if quantised:
        scales = SCALE * (-(-hidden // GROUP) if experts is Number.FP8 else 1)
        costs.append(KernelCost("quantize hidden", 0, tokens * (hidden * 3 + scales), Number.BF16))
    costs.append(
        KernelCost("gate-up, SiLU", 4 * hidden * mlp.expert_width * assignments, weights * 2 / 3 + gated, experts)
    )
    if experts is Number.INT8:
        # A row's scale is known only when the whole row is: the product is written in bf16, read, and written again.
        costs.append(KernelCost("quantize product", 0, assignments * (mlp.expert_width * 4 + SCALE), Number.BF16))
    costs.append(KernelCost("down", 2 * hidden * mlp.expert_width * assignments, weights / 3 + down, experts))
    costs.append(KernelCost("unpermute", 0, (assignments + tokens) * hidden * 2 + assignments * 8, Number.BF16))
    return tuple(costs)


def attention_kernel(shape: ModelShape, layer: LayerShape, sequence: int, sequences: int) -> KernelCost:
    """Scores and weighted sums of whole sequences in bf16, nothing cached; queries, keys, values and outputs once."""
    one = ModelShape(shape.model_type, shape.hidden, shape.vocab, shape.tied_head, (layer,))
    flops = ModelCost(one, counting=AttentionCounting.CAUSAL).attention_flops(sequence) * sequences
    a = layer.attention
    elements = a.heads * (a.head_dim + a.value_dim) + a.kv_heads * (a.head_dim + a.value_dim)
    return KernelCost("attention", flops, sequences * sequence * elements * 2, Number.BF16)


def gather_seconds(
    shape: ModelShape, layer: LayerShape, experts: Number, device: Device, ranks: int
) -> tuple[float, float]:
    """Least time to bring one layer's missing experts: from ``ranks - 1`` peers, and from the host."""
    size = 3 * shape.hidden * layer.mlp.expert_width * layer.mlp.experts * experts.size
    return size * (ranks - 1) / ranks / device.link_bytes, size * (ranks - 1) / ranks / device.host_bytes
