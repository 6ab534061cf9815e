"""Tensors as frames of messages, and the fingerprint by which a frame that changed on its way is seen."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import xxhash


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, where they are."""
    return memoryview(tensor.detach().view(torch.uint8).numpy()).cast("B")


def on(frame: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A frame's bytes as a tensor, where they are; only to be read, and the frame has to be kept."""
    if not len(frame):
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # torch warns that a read-only buffer could be written through the tensor.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.frombuffer(frame, dtype=dtype).view(shape)


def fingerprint(*frames: Any) -> int:
    """XXH3-64 of frames one after the other; never 0."""
    state = xxhash.xxh3_64()
    for frame in frames:
        state.update(frame)
    return state.intdigest() or 1
