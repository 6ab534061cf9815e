"""A fingerprint of an expert's bytes, so that a gather that came torn, stale or from another model is seen."""

from __future__ import annotations

import torch
import xxhash


def digest(tensor: torch.Tensor) -> int:
    """XXH3-64 of a contiguous CPU tensor's bytes. Reads at about the speed of memory."""
    return xxhash.xxh3_64_intdigest(memoryview(tensor.detach().view(torch.uint8).numpy()))
