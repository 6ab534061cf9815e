"""FLOPs and bytes of a prefill pass, from a Hugging Face configuration. Pure: no torch, no numpy.

Rule 4 of the house: router, scheduler, calibration, benches and simulator all use this one model.
"""

from __future__ import annotations

from asyncep_router.cost.model import AttentionCounting, ModelCost
from asyncep_router.cost.shape import AttentionShape, LayerShape, MlpShape, ModelShape, read_shape

__all__ = [
    "AttentionCounting",
    "AttentionShape",
    "LayerShape",
    "MlpShape",
    "ModelCost",
    "ModelShape",
    "read_shape",
]
