"""Formulas: FLOPs and bytes of one forward pass of `new` tokens after `cached` ones.

A multiply-add counts as two FLOPs; only matrix products count (norms, activations, softmax and rotary
embeddings are below 1 % at every size served). Sources: the operators of the models themselves;
`test/asyncep_router/test_cost_counter.py` holds every family against torch's FLOP counter.

With h the hidden size, per token and layer:

    attention, grouped-query   2 h d (H + 2 H_kv) + 2 H d h                   projections
                               4 H d                 per query-key pair       scores and weighted sum
    attention, latent (MLA)    see `_mla_linear`, `_pair_flops`
    dense MLP of width w       6 h w                                          gate, up, down
    MoE                        2 h E  +  6 h w k  +  shared experts           router, k of E experts
    head                       2 h V                 per logit position       not per token

Token i of a pass (counted from 0, after p cached ones) attends p + i + 1 keys, or `window` if fewer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from asyncep_router.cost.shape import AttentionShape, ModelShape, read_shape
from asyncep_router.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class AttentionCounting(Enum):
    """Which query-key pairs are paid for."""

    CAUSAL = "causal"
    """What a fused kernel computes: the causal triangle, cut by the window. What we charge."""
    SQUARE = "square"
    """What an eager implementation computes: every query against every key, then a mask."""


@dataclass(frozen=True)
class ModelCost:
    """Closed-form cost of one model. Hashable, picklable, about a microsecond per call.

    `mla_absorbed`: latent attention with the up-projections folded into query and output (what decode
    kernels do); False is the expanded form in which prefill kernels run, and the default.
    `mla_expand_cached`: in the expanded form, count re-expanding the cached latents too (a kernel that
    reads the latent cache has to). Off by default, so that a prefix costs what computing it once costs.
    `weight_itemsize`, `expert_itemsize`, `kv_itemsize`: bytes an element (2 for bf16, 1 for fp8).
    """

    shape: ModelShape
    weight_itemsize: float = 2
    expert_itemsize: float = 2
    kv_itemsize: float = 2
    mla_absorbed: bool = False
    mla_expand_cached: bool = False
    counting: AttentionCounting = AttentionCounting.CAUSAL

    linear_flops_per_token: int = field(init=False)
    """All layers' products whose cost does not depend on context, one token; the head is not in it."""
    head_flops: int = field(init=False)
    """Language-model head, one logit position."""
    _pair_flops: tuple[tuple[int | None, int], ...] = field(init=False)
    """(window, FLOPs per query-key pair summed over the layers that have this window)."""
    _cached_flops_per_token: int = field(init=False)

    def __post_init__(self) -> None:
        for name in ("weight_itemsize", "expert_itemsize", "kv_itemsize"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be above 0")
        pairs: Counter[int | None] = Counter()
        linear = cached = 0
        for layer in self.shape.layers:
            attention = layer.attention
            linear += self._attention_linear(attention) + self._mlp_flops(layer.mlp.dense_width)
            linear += 2 * self.shape.hidden * layer.mlp.experts + self._mlp_flops(layer.mlp.expert_width) * (
                layer.mlp.top_k
            )
            linear += 2 * self.shape.hidden * layer.mlp.shared_gate
            pairs[attention.window] += _pair_flops(attention, self.mla_absorbed)
            if attention.latent_dim and self.mla_expand_cached and not self.mla_absorbed:
                cached += _latent_expansion(attention)
        # A frozen dataclass derives its fields once, here; nothing writes them again.
        object.__setattr__(self, "linear_flops_per_token", linear)
        object.__setattr__(self, "head_flops", 2 * self.shape.hidden * self.shape.vocab)
        object.__setattr__(self, "_pair_flops", tuple(pairs.items()))
        object.__setattr__(self, "_cached_flops_per_token", cached)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **settings: Any) -> ModelCost:
        """From a Hugging Face configuration as a mapping."""
        return cls(read_shape(config), **settings)

    # FLOPs

    def flops(self, new: int, cached: int = 0, logits: int = 1) -> int:
        """FLOPs of a pass of `new` tokens after `cached` ones that yields `logits` logit rows."""
        return (
            self.linear_flops_per_token * new
            + self.attention_flops(new, cached)
            + self._cached_flops_per_token * cached
            + self.head_flops * logits
        )

    def attention_flops(self, new: int, cached: int = 0) -> int:
        """Scores and weighted sums alone (no projections), all layers."""
        if self.counting is AttentionCounting.SQUARE:
            return sum(flops for _, flops in self._pair_flops) * new * (cached + new)
        return sum(flops * _causal_pairs(new, cached, window) for window, flops in self._pair_flops)

    def batch_flops(self, passes: Iterable[tuple[int, int]], logits_each: int = 1) -> int:
        """FLOPs of a batch; `passes` holds (new, cached) for every request."""
        return sum(self.flops(new, cached, logits_each) for new, cached in passes)

    def prefix_flops(self, length: int) -> int:
        """FLOPs of computing a prefix of `length` tokens, no logits: what a full cache hit saves."""
        return self.flops(length, 0, 0)

    def layer_flops(self, new: int, cached: int = 0) -> float:
        """Mean FLOPs of one layer of the pass: the quantity that T, the threshold, is measured in."""
        return self.flops(new, cached, 0) / len(self.shape.layers)

    def tokens_within(self, budget: float, cached: int = 0) -> int:
        """The most new tokens after `cached` ones that cost no more than `budget` FLOPs. Cost grows with tokens."""
        low, high = 0, 1
        while self.flops(high, cached) <= budget:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.flops(middle, cached) <= budget else (low, middle)
        return low

    def threshold_flops(self, per_layer: float) -> float:
        """T as calibrated (FLOPs per layer and batch) in FLOPs of a whole pass, the ledger's unit.

        Mean over layers: models mix dense and sparse layers, but gathers overlap across layers, so it
        is the pass as a whole that must be long enough.
        """
        return per_layer * len(self.shape.layers)

    def threshold_per_layer(self, threshold: float) -> float:
        """The inverse of `threshold_flops`."""
        return threshold / len(self.shape.layers)

    @property
    def expert_flops_per_token(self) -> int:
        """Routed experts' share of `linear_flops_per_token`."""
        return sum(self._mlp_flops(layer.mlp.expert_width) * layer.mlp.top_k for layer in self.shape.layers)

    # Bytes

    @property
    def expert_bytes_per_layer(self) -> float:
        """All routed experts of the largest sparse layer: what one gather moves, at most."""
        return max((self._expert_elements(i) for i in range(len(self.shape.layers))), default=0) * (
            self.expert_itemsize
        )

    @property
    def expert_bytes(self) -> float:
        """All routed experts of all layers."""
        return sum(self._expert_elements(i) for i in range(len(self.shape.layers))) * self.expert_itemsize

    @property
    def weight_bytes(self) -> float:
        """All weights: experts, everything else, embedding and (unless tied) head."""
        return self.expert_bytes + self._dense_elements() * self.weight_itemsize

    @property
    def kv_bytes_per_token(self) -> float:
        """What the KV cache holds for a token, all layers (latent and rotary key alone under MLA)."""
        return self.kv_itemsize * sum(_kv_elements(layer.attention) for layer in self.shape.layers)

    def bytes_read(self, new: int, cached: int = 0, logits: int = 1) -> float:
        """Bytes a pass moves between memory and processor, activations left out.

        Weights once; of E experts, the number that `new` tokens choosing k each hit on average,
        E (1 - (1 - k/E)^new); the cached keys and values once; the new ones written once.
        """
        experts = 0.0
        for i, layer in enumerate(self.shape.layers):
            if layer.mlp.experts:
                missed = (1 - layer.mlp.top_k / layer.mlp.experts) ** new
                experts += self._expert_elements(i) * (1 - missed)
        table = self.shape.hidden * self.shape.vocab
        dense = self._dense_elements() - table * (1 if self.shape.tied_head else 2)
        dense += self.shape.hidden * new + (table if logits else 0)
        return experts * self.expert_itemsize + dense * self.weight_itemsize + self.kv_bytes_per_token * (cached + new)

    # Parts

    def _mlp_flops(self, width: int) -> int:
        return 6 * self.shape.hidden * width

    def _attention_linear(self, a: AttentionShape) -> int:
        hidden = self.shape.hidden
        if not a.latent_dim:
            return 2 * hidden * (a.heads * a.head_dim * 2 + a.kv_heads * (a.head_dim + a.value_dim))
        return 2 * _mla_elements(a, hidden)

    def _expert_elements(self, index: int) -> int:
        mlp = self.shape.layers[index].mlp
        return 3 * self.shape.hidden * mlp.expert_width * mlp.experts

    def _dense_elements(self) -> int:
        """Weights that are not routed experts; biases and norms (below 0.1 %) are left out."""
        hidden = self.shape.hidden
        total = hidden * self.shape.vocab * (1 if self.shape.tied_head else 2)
        for layer in self.shape.layers:
            total += self._attention_linear(layer.attention) // 2
            total += 3 * hidden * layer.mlp.dense_width + hidden * layer.mlp.experts
            total += hidden * layer.mlp.shared_gate
        return total


def _causal_pairs(new: int, cached: int, window: int | None) -> int:
    """Query-key pairs of `new` queries after `cached` tokens, each seeing at most `window` keys."""
    end = cached + new
    if window is None or end <= window:
        return new * cached + new * (new + 1) // 2
    return _windowed(end, window) - _windowed(cached, window)


def _windowed(length: int, window: int) -> int:
    """Pairs of a whole sequence: 1 + 2 + … + window, then `window` for every further token."""
    if length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def _pair_flops(a: AttentionShape, absorbed: bool) -> int:
    """FLOPs of one query against one key and value, all heads."""
    if a.latent_dim and absorbed:
        return 2 * a.heads * (a.latent_dim + a.rope_dim) + 2 * a.heads * a.latent_dim
    return 2 * a.heads * a.head_dim + 2 * a.heads * a.value_dim


def _latent_expansion(a: AttentionShape) -> int:
    """FLOPs of turning one token's latent into keys and values of all heads (`kv_b_proj`)."""
    return 2 * a.latent_dim * a.heads * (a.nope_dim + a.value_dim)


def _mla_elements(a: AttentionShape, hidden: int) -> int:
    """Weights of a latent attention, each used once per token.

    The absorbed form multiplies queries by the key half of `kv_b_proj` and outputs by its value half:
    as many products per new token as expanding that token's latent, so both forms share this count.
    """
    query_width = a.heads * a.head_dim
    query = hidden * query_width
    if a.query_latent_dim:
        query = (hidden + query_width) * a.query_latent_dim
    latent = hidden * (a.latent_dim + a.rope_dim)
    return query + latent + _latent_expansion(a) // 2 + a.heads * a.value_dim * hidden


def _kv_elements(a: AttentionShape) -> int:
    if a.latent_dim:
        return a.latent_dim + a.rope_dim
    return a.kv_heads * (a.head_dim + a.value_dim)
