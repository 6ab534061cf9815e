"""Whether a checkpoint is one this runtime serves, decided from its configuration before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyncep_sgl.errors import UnsupportedModelError

# Architectures whose served log-probabilities are tested against Transformers.
SUPPORTED = (
    "Qwen3MoeForCausalLM",
    "Qwen2MoeForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
)
# What the pinned SGLang's attention does not compute without a GPU.
_NOT_ON_CPU = {
    "DeepseekV2ForCausalLM": "multi-head latent attention",
    "DeepseekV3ForCausalLM": "multi-head latent attention",
    "GptOssForCausalLM": "attention sinks",
}
# Families name the number of experts differently, and Transformers writes other names than the hub has.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The Hugging Face configuration of a local folder or a hub name.

    Raises:
        UnsupportedModelError: there is none, or it is not JSON.
    """
    path = Path(model) / "config.json"
    try:
        if not Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model, "config.json", revision=revision))
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except json.JSONDecodeError as error:
        raise UnsupportedModelError(f"--model-path {model}: {path} is not JSON: {error}") from error
    except Exception as error:  # the hub client raises many kinds; all mean the same to the operator
        raise UnsupportedModelError(
            f"--model-path {model}: no config.json there ({type(error).__name__}); give a folder or a hub name"
        ) from error


def local_folder(model: str, revision: str | None = None) -> str:
    """Where a checkpoint's files are: the folder itself, or the hub's copy that SGLang has downloaded."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download

    folder: str = snapshot_download(model, revision=revision, local_files_only=True)
    return folder


def check_supported(config: Mapping[str, Any], *, device: str) -> int:
    """Number of experts a layer, for a model that can be served.

    Args:
        config: Hugging Face configuration.
        device: ``cpu`` or an accelerator's name.

    Raises:
        UnsupportedModelError: dense, unknown or quantised, with what to do instead.
    """
    architecture = (config.get("architectures") or ["unknown"])[0]
    experts = next((int(config[key]) for key in _EXPERT_COUNTS if config.get(key)), 0)
    if architecture not in SUPPORTED:
        if not experts:
            raise UnsupportedModelError(
                f"{architecture} is a dense model and has no experts to share; serve it with `sglang serve`"
            )
        if device == "cpu" and architecture in _NOT_ON_CPU:
            raise UnsupportedModelError(
                f"{architecture} needs {_NOT_ON_CPU[architecture]}, which the pinned SGLang computes on GPUs only; "
                f"served on a CPU are {', '.join(SUPPORTED)}"
            )
        raise UnsupportedModelError(f"{architecture} is not among the served architectures: {', '.join(SUPPORTED)}")
    if experts < 1:
        raise UnsupportedModelError(
            f"{architecture} without a number of experts ({', '.join(_EXPERT_COUNTS)}) in its config.json"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise UnsupportedModelError(
            f"the checkpoint is quantised ({method}); this version shares bf16 and fp32 experts, use such a checkpoint"
        )
    return experts
