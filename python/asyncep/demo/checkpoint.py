"""Write converted layers as a Mixtral checkpoint, the way the Hugging Face hub stores one.

Mixtral's attention is Llama's (no biases, no norms on queries and keys), so it carries over unchanged. The
head is written out although SmolLM2 ties it to the embeddings: SGLang's Mixtral does not tie them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from asyncep.demo.moefy import MoeLayer

_COPIED = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)


def save_mixtral(
    directory: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[MoeLayer],
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Write configuration, weights and tokenizer into ``directory``; returns the bytes of the experts."""
    from safetensors.torch import save_file

    experts = len(layers[0].router)
    config = mixtral_config(model.config, experts, top_k, dtype)
    config.save_pretrained(directory)
    generation = model.generation_config
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in _tensors(model, layers).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def mixtral_config(dense: Any, experts: int, top_k: int, dtype: torch.dtype) -> Any:
    """A Mixtral configuration with the dense model's dimensions."""
    from transformers import MixtralConfig

    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=dense.vocab_size,
        hidden_size=dense.hidden_size,
        intermediate_size=dense.intermediate_size // experts,
        num_hidden_layers=dense.num_hidden_layers,
        num_attention_heads=dense.num_attention_heads,
        num_key_value_heads=dense.num_key_value_heads,
        head_dim=dense.head_dim,
        max_position_embeddings=dense.max_position_embeddings,
        rms_norm_eps=dense.rms_norm_eps,
        rope_parameters=dict(dense.rope_parameters),
        bos_token_id=dense.bos_token_id,
        eos_token_id=dense.eos_token_id,
        pad_token_id=dense.pad_token_id,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        tie_word_embeddings=False,
        dtype=dtype,
    )


def _tensors(model: Any, layers: Sequence[MoeLayer]) -> dict[str, torch.Tensor]:
    embeddings = model.model.embed_tokens.weight.detach()
    tensors = {
        "model.embed_tokens.weight": embeddings,
        "model.norm.weight": model.model.norm.weight.detach(),
        "lm_head.weight": embeddings.clone(),
    }
    for index, (dense, layer) in enumerate(zip(model.model.layers, layers, strict=True)):
        at = f"model.layers.{index}"
        for name in _COPIED:
            tensors[f"{at}.{name}.weight"] = dense.get_submodule(name).weight.detach()
        tensors[f"{at}.block_sparse_moe.gate.weight"] = layer.router
        for expert in range(len(layer.router)):
            mine = layer.assignment == expert
            to = f"{at}.block_sparse_moe.experts.{expert}"
            tensors[f"{to}.w1.weight"] = dense.mlp.gate_proj.weight.detach()[mine]
            tensors[f"{to}.w3.weight"] = dense.mlp.up_proj.weight.detach()[mine]
            tensors[f"{to}.w2.weight"] = layer.down[:, mine]
    return tensors
