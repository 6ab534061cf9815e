"""Which of SGLang's attention backends serves on CUDA, and its flags. Pure; see docs/internals/gpu_kernels.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncep_router.cost import read_shape
from asyncep_sgl.errors import UsageError

# In this order: FlashInfer's ragged wrapper is made for batches of whole prompts, and reads no KV pool where nothing
# is cached; FlashAttention 3 always writes and reads it; Triton's kernel is there whenever Triton is.
ORDER = ("flashinfer", "fa3", "triton", "torch_native")
# Widths of a head that FlashInfer's prefill kernels are compiled for.
FLASHINFER_HEADS = (64, 128, 256)
PAGED_VARIABLE = "SGLANG_FLASHINFER_USE_PAGED"


@dataclass(frozen=True)
class CudaHost:
    """What is installed and on which device."""

    capability: tuple[int, int]
    """As torch says: (9, 0) for an H100."""
    flashinfer: bool
    """Whether it can be imported, and its kernels be loaded or compiled."""
    fa3: bool
    """Whether sgl-kernel has FlashAttention 3 for the device."""


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of its attention."""

    head_dim: int
    latent: bool = False
    """Multi-head latent attention (DeepSeek)."""
    sinks: bool = False
    """A learned logit per head that takes weight from all keys (gpt-oss)."""
    window: bool = False
    """Some layer sees only the last so many tokens."""


@dataclass(frozen=True)
class AttentionChoice:
    """A backend and how SGLang is told."""

    backend: str
    flags: tuple[str, ...]
    """For SGLang's command line."""
    environment: Mapping[str, str]
    """For every rank's process."""
    passed_over: Mapping[str, str]
    """Backends before it in the order, and why not they."""


def needs_of(config: Mapping[str, Any]) -> AttentionNeeds:
    """From a Hugging Face configuration.

    Raises:
        UnsupportedModelError: of the router; no cost formulas for this model.
    """
    layers = [layer.attention for layer in read_shape(config).layers]
    return AttentionNeeds(
        head_dim=max(attention.head_dim for attention in layers),
        latent=any(attention.latent_dim for attention in layers),
        sinks=config.get("model_type") == "gpt_oss",
        window=any(attention.window is not None for attention in layers),
    )


def choose(
    host: CudaHost, needs: AttentionNeeds, *, requested: str | None = None, kv_free: bool = False
) -> AttentionChoice:
    """The first backend in the order that can serve, or the requested one.

    Args:
        host: the device and what is installed.
        needs: of the model.
        requested: the operator's ``--attention-backend``.
        kv_free: neither prefixes are reused nor prompts cut, so that no prompt's keys are needed after its pass.

    Raises:
        UsageError: the requested backend cannot serve the model here.
    """
    if requested is not None:
        why = _refusal(requested, host, needs)
        if why:
            raise UsageError(f"--attention-backend {requested}: {why}; leave the flag out to have one chosen")
        return _settings(requested, needs, {}, kv_free)
    passed_over: dict[str, str] = {}
    for backend in ORDER:
        why = _refusal(backend, host, needs)
        if why is None:
            return _settings(backend, needs, passed_over, kv_free)
        passed_over[backend] = why
    reasons = "; ".join(f"{backend}: {why}" for backend, why in passed_over.items())
    raise UsageError(f"no attention backend serves this model on this device ({reasons})")


def _refusal(backend: str, host: CudaHost, needs: AttentionNeeds) -> str | None:
    """Why ``backend`` cannot serve; None if it can. Of a backend not in the order nothing is known: it may."""
    if backend == "flashinfer":
        if not host.flashinfer:
            return "FlashInfer cannot be imported"
        if host.capability < (8, 0):
            return f"FlashInfer needs compute capability 8.0, this device has {host.capability[0]}.{host.capability[1]}"
        if needs.sinks:
            return "SGLang passes no attention sinks to FlashInfer"
        if not needs.latent and needs.head_dim not in FLASHINFER_HEADS:
            return f"FlashInfer has no prefill kernel for heads of {needs.head_dim}"
    if backend == "fa3":
        if not host.fa3:
            return "sgl-kernel has no FlashAttention 3 for this device"
        if host.capability[0] != 9 and needs.latent:
            return "FlashAttention 3 computes latent attention on sm_90 only"
    if backend == "torch_native" and (needs.sinks or needs.latent or needs.window):
        return "torch's own attention has neither sinks nor windows nor latent attention"
    return None


def _settings(backend: str, needs: AttentionNeeds, passed_over: Mapping[str, str], kv_free: bool) -> AttentionChoice:
    # Graphs are for decoding steps, which never come; captured prefills turn FlashInfer's ragged wrapper off.
    flags = ["--attention-backend", backend, "--disable-cuda-graph"]
    environment = {}
    if backend == "flashinfer":
        # Pages of one token: a prefix is reused to its last token, and FlashInfer's paged wrapper takes no more for it.
        flags += ["--page-size", "1"]
        # Without a cached prefix SGLang gives the ragged wrapper no window, and every token would see all before it.
        environment[PAGED_VARIABLE] = "1" if needs.window else "0"
    if kv_free:
        flags += ["--disable-radix-cache", "--chunked-prefill-size", "-1"]
    return AttentionChoice(backend, tuple(flags), environment, dict(passed_over))
