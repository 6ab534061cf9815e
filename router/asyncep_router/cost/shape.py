"""What a Hugging Face configuration says about the size of every layer.

Reading (names, defaults, which layer is sparse) is kept apart from the formulas in `model.py`: each
model family spells the same few numbers differently, and only this file knows the spellings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncep_router.errors import UnsupportedModelError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention.

    `latent_dim` is 0 for grouped-query attention. For multi-head latent attention (DeepSeek) it is
    `kv_lora_rank`; then `head_dim` is the width of a query/key head (nope + rope), `value_dim` that of
    a value head, `rope_dim` the shared rotary part and `query_latent_dim` `q_lora_rank` (0: no
    low-rank query).
    `window`: keys a query sees at most, itself included; None sees all before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    latent_dim: int = 0
    rope_dim: int = 0
    query_latent_dim: int = 0

    @property
    def nope_dim(self) -> int:
        """Part of a query/key head that carries no position."""
        return self.head_dim - self.rope_dim


@dataclass(frozen=True)
class MlpShape:
    """One layer's feed-forward part; every matrix triple is gate, up and down.

    `dense_width`: what every token passes (a dense layer, or the shared experts; 0 if none).
    `shared_gate`: the shared expert's output is weighed by a scalar gate (Qwen2-MoE).
    """

    dense_width: int
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_gate: bool = False


@dataclass(frozen=True)
class LayerShape:
    """A decoder layer."""

    attention: AttentionShape
    mlp: MlpShape


@dataclass(frozen=True)
class ModelShape:
    """All the cost model needs to know. `layers` is in the model's order."""

    model_type: str
    hidden: int
    vocab: int
    tied_head: bool
    layers: tuple[LayerShape, ...]

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(1 for layer in self.layers if layer.mlp.experts)


def read_shape(config: Config) -> ModelShape:
    """Read a configuration as `config.to_dict()` or `config.json` gives it.

    Raises `UnsupportedModelError` for a model type without formulas: a wrong count would silently
    misplace every request.
    """
    if "text_config" in config and "hidden_size" not in config:
        config = config["text_config"]
    model_type = str(config.get("model_type", ""))
    if model_type not in _MLP_READERS:
        raise UnsupportedModelError(
            f"model_type={model_type!r}: no cost formulas; known are {', '.join(sorted(_MLP_READERS))}"
        )
    count = _number(config, "num_hidden_layers")
    read_mlp = _MLP_READERS[model_type]
    layers = tuple(LayerShape(_attention(config, index), read_mlp(config, index)) for index in range(count))
    return ModelShape(
        model_type=model_type,
        hidden=_number(config, "hidden_size"),
        vocab=_number(config, "vocab_size"),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        layers=layers,
    )


def _number(config: Config, *keys: str) -> int:
    """The first of `keys` that the configuration sets."""
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not isinstance(value, int) or value < 0:
                raise UnsupportedModelError(f"{key}={value!r}: expected a number of at least 0")
            return value
    raise UnsupportedModelError(f"model_type={config.get('model_type')!r}: the configuration lacks {' / '.join(keys)}")


def _attention(config: Config, index: int) -> AttentionShape:
    heads = _number(config, "num_attention_heads")
    if config.get("kv_lora_rank"):
        rope = _number(config, "qk_rope_head_dim")
        return AttentionShape(
            heads=heads,
            kv_heads=heads,
            head_dim=_number(config, "qk_nope_head_dim") + rope,
            value_dim=_number(config, "v_head_dim"),
            latent_dim=_number(config, "kv_lora_rank"),
            rope_dim=rope,
            query_latent_dim=config.get("q_lora_rank") or 0,
        )
    head_dim = config.get("head_dim") or _number(config, "hidden_size") // heads
    return AttentionShape(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        value_dim=head_dim,
        window=_window(config, index),
    )


def _window(config: Config, index: int) -> int | None:
    window = config.get("sliding_window")
    if not window:
        return None
    layer_types = config.get("layer_types")
    if layer_types:
        return int(window) if layer_types[index] == "sliding_attention" else None
    if "use_sliding_window" in config:
        # Qwen's convention: the first max_window_layers see everything.
        if not config["use_sliding_window"] or index < (config.get("max_window_layers") or 0):
            return None
        return int(window)
    if config.get("model_type") == "gpt_oss":
        return int(window) if index % 2 == 0 else None  # its default layer_types alternate, sliding first
    return int(window)


def _dense(config: Config, _index: int) -> MlpShape:
    return MlpShape(dense_width=_number(config, "intermediate_size"))


def _qwen_moe(config: Config, index: int) -> MlpShape:
    experts = _number(config, "num_experts", "num_local_experts")
    step = config.get("decoder_sparse_step") or 1
    if index in (config.get("mlp_only_layers") or ()) or not experts or (index + 1) % step:
        return _dense(config, index)
    shared = config.get("shared_expert_intermediate_size") or 0
    return MlpShape(
        dense_width=shared,
        experts=experts,
        top_k=_number(config, "num_experts_per_tok"),
        expert_width=_number(config, "moe_intermediate_size"),
        shared_gate=bool(shared),
    )


def _all_moe(config: Config, _index: int) -> MlpShape:
    """Mixtral, OLMoE, gpt-oss: every layer is sparse and `intermediate_size` is one expert's."""
    return MlpShape(
        dense_width=0,
        experts=_number(config, "num_local_experts", "num_experts"),
        top_k=_number(config, "num_experts_per_tok"),
        expert_width=_number(config, "intermediate_size"),
    )


def _deepseek(config: Config, index: int) -> MlpShape:
    first_sparse = config.get("first_k_dense_replace") or 0
    frequency = config.get("moe_layer_freq") or 1
    experts = config.get("n_routed_experts") or config.get("num_local_experts") or 0
    if not experts or index < first_sparse or index % frequency:
        return _dense(config, index)
    width = _number(config, "moe_intermediate_size")
    return MlpShape(
        dense_width=width * (config.get("n_shared_experts") or 0),
        experts=experts,
        top_k=_number(config, "num_experts_per_tok"),
        expert_width=width,
    )


_MLP_READERS = {
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "mixtral": _all_moe,
    "olmoe": _all_moe,
    "gpt_oss": _all_moe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "glm4_moe": _deepseek,
}
