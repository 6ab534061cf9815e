"""What a batch asks of each kind of layer, counted by the router's cost model (one cost model for everything).

A model's layers fall into few kinds (DeepSeek: dense and sparse; gpt-oss: full and windowed attention). The cost
model of a model with that one layer gives the kind's figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from asyncep.sim.errors import DataError
from asyncep_router.cost import LayerShape, ModelCost, read_shape

ITEMSIZE = {"bf16": 2.0, "fp8": 1.0}
"""Bytes of a weight by data type."""


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike. FLOPs are per token.

    `cost`: cost model of this layer alone. `dense_flops`: all products but the routed experts'. `expert_flops`: theirs.
    `expert_bytes`: all routed experts of the layer.
    """

    shape: LayerShape
    cost: ModelCost
    count: int
    dense_flops: float
    expert_flops: float
    expert_bytes: float
    dense_bytes: float


@dataclass(frozen=True)
class Model:
    """A model as the simulator sees it. `order`: the kind of each layer, as indices into `kinds`."""

    name: str
    cost: ModelCost
    dtype: str
    kinds: tuple[LayerKind, ...] = field(init=False)
    order: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shapes: dict[LayerShape, int] = {}
        order = [shapes.setdefault(layer, len(shapes)) for layer in self.cost.shape.layers]
        object.__setattr__(self, "order", tuple(order))
        object.__setattr__(self, "kinds", tuple(self._kind(s, order.count(i)) for s, i in shapes.items()))

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any], dtype: str = "bf16") -> Model:
        """From a Hugging Face configuration; weights in `dtype`, KV cache in bf16. Raises `DataError`,
        `UnsupportedModelError`."""
        if dtype not in ITEMSIZE:
            raise DataError(f"dtype {dtype!r}: known are {', '.join(ITEMSIZE)}")
        size = ITEMSIZE[dtype]
        return cls(name, ModelCost(read_shape(config), weight_itemsize=size, expert_itemsize=size), dtype)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.order)

    @property
    def experts(self) -> int:
        """Routed experts of a sparse layer; 0 for a dense model."""
        return max(kind.shape.mlp.experts for kind in self.kinds)

    @property
    def top_k(self) -> int:
        """Experts a token goes through in a sparse layer."""
        return max(kind.shape.mlp.top_k for kind in self.kinds)

    @property
    def sparse_layers(self) -> int:
        """Layers with routed experts."""
        return self.cost.shape.moe_layers

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.cost.shape.hidden

    @property
    def itemsize(self) -> float:
        """Bytes of a weight."""
        return ITEMSIZE[self.dtype]

    @property
    def dense_bytes(self) -> float:
        """Weights that are not routed experts."""
        return self.cost.weight_bytes - self.cost.expert_bytes

    def _kind(self, shape: LayerShape, count: int) -> LayerKind:
        cost = replace(self.cost, shape=replace(self.cost.shape, layers=(shape,)))
        experts = cost.expert_flops_per_token
        table = self.cost.shape.hidden * self.cost.shape.vocab * (1 if self.cost.shape.tied_head else 2)
        return LayerKind(
            shape=shape,
            cost=cost,
            count=count,
            dense_flops=cost.linear_flops_per_token - experts,
            expert_flops=experts,
            expert_bytes=cost.expert_bytes,
            dense_bytes=cost.weight_bytes - cost.expert_bytes - table * cost.weight_itemsize,
        )


@dataclass(slots=True)
class Batch:
    """A batch's work. `pairs`: attention FLOPs of one layer of each kind. `pairs_by_length`: the same, each
    sequence's divided by its tokens (cached and new). `flops`: all of it, heads included."""

    tokens: int = 0
    requests: int = 0
    logits: int = 0
    cached: int = 0
    flops: float = 0.0
    pairs: list[float] = field(default_factory=list)
    pairs_by_length: list[float] = field(default_factory=list)

    def add(self, model: Model, new: int, cached: int, logits: int = 1) -> None:
        """A pass of `new` tokens after `cached`; `logits`: rows of logits it yields (0 for all but the last chunk)."""
        if not self.pairs:
            self.pairs = [0.0] * len(model.kinds)
            self.pairs_by_length = [0.0] * len(model.kinds)
        self.tokens += new
        self.requests += 1
        self.logits += logits
        self.cached += cached
        self.flops += model.cost.flops(new, cached, logits)
        length = new + cached
        for i, kind in enumerate(model.kinds):
            pairs = kind.cost.attention_flops(new, cached)
            window = kind.shape.attention.window
            self.pairs[i] += pairs
            self.pairs_by_length[i] += pairs / (min(length, window) if window else length)

    @classmethod
    def of(cls, model: Model, passes: Iterable[tuple[int, int]]) -> Batch:
        """From (new, cached) of every request."""
        batch = cls()
        for new, cached in passes:
            batch.add(model, new, cached)
        return batch


def uniform(model: Model, tokens: int, length: int) -> Batch:
    """About `tokens` tokens in equal requests of `length` (one shorter one if `tokens` is less): for planning."""
    length = max(1, min(length, tokens))
    count = max(1, round(tokens / length))
    batch = Batch.of(model, [(length, 0)])
    return Batch(
        tokens=count * batch.tokens,
        requests=count,
        logits=count,
        flops=count * batch.flops,
        pairs=[count * pairs for pairs in batch.pairs],
        pairs_by_length=[count * pairs for pairs in batch.pairs_by_length],
    )
