"""A random checkpoint larger than what one would like to hold in memory: written layer by layer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_SCALE = 0.02


def large_qwen3(name: str, config: dict[str, Any]) -> Path:
    """The checkpoint's folder (Qwen3-MoE, bf16, seed 0), one file a layer; built once into the user's cache."""
    cache = Path(os.environ.get("ASYNCEP_CACHE") or Path.home() / ".cache" / "asyncep")
    folder = cache / "bench-models" / name
    if (folder / "config.json").exists():
        return folder
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True, exist_ok=True)
    pool = _Pool()
    where: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(_files(config)):
        file = f"model-{number:05d}.safetensors"
        tensors = {tensor: pool.tensor(shape) for tensor, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # Last: a folder with a configuration is whole.
    settings = Qwen3MoeConfig(**config, architectures=["Qwen3MoeForCausalLM"], dtype=torch.bfloat16)
    settings.save_pretrained(folder)
    return folder


class _Pool:
    """Random numbers, drawn once: each tensor is a window of them somewhere, so that writing takes the disk's time."""

    def __init__(self) -> None:
        self._numbers = torch.Generator().manual_seed(0)
        self._pool = torch.randn(1 << 24, generator=self._numbers).mul_(_SCALE).to(torch.bfloat16)

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)  # a norm's
        count = math.prod(shape)
        start = int(torch.randint(len(self._pool) - count, (), generator=self._numbers))
        return self._pool[start : start + count].view(shape).clone()


def _files(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of each file's tensors."""
    hidden, inter, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    vocabulary = (config["vocab_size"], hidden)
    yield {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,), "lm_head.weight": vocabulary}
    for layer in range(config["num_hidden_layers"]):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
            "mlp.gate": (config["num_experts"], hidden),
        }
        for expert in range(config["num_experts"]):
            shapes[f"mlp.experts.{expert}.gate_proj"] = shapes[f"mlp.experts.{expert}.up_proj"] = (inter, hidden)
            shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, inter)
        yield {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
