"""The model behind the workers: its cost, from its configuration, wherever that can be found."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import orjson

from asyncep_router.cost import AttentionShape, LayerShape, MlpShape, ModelCost, ModelShape
from asyncep_router.errors import UnsupportedModelError

logger = logging.getLogger("asyncep_router")

DEFAULT_THRESHOLD_TOKENS = 8192
"""Tokens that saturate a rank that says nothing about itself: SGLang's usual prefill chunk."""

_HUB_SECONDS = 5.0


def stand_in() -> ModelCost:
    """A mid-sized dense model. Used while the real one is unknown: ratios between prompts come out about right."""
    attention = AttentionShape(heads=32, kv_heads=8, head_dim=128, value_dim=128)
    layer = LayerShape(attention, MlpShape(dense_width=14336))
    return ModelCost(ModelShape("unknown", hidden=4096, vocab=128256, tied_head=False, layers=(layer,) * 32))


def read_config(model_path: str) -> dict[str, Any] | None:
    """The model's config.json from a folder, from the hub's cache or from the hub; None if nowhere. Blocks."""
    path = Path(model_path) / "config.json"
    try:
        if not path.is_file():
            if Path(model_path).is_absolute():
                return None
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model_path, "config.json", etag_timeout=_HUB_SECONDS))
        config = orjson.loads(path.read_bytes())
    # The hub's client raises its own and its transport's errors; whichever it is, we go on without.
    except Exception as error:
        logger.info("config.json of %s: %s", model_path, error)
        return None
    return config if isinstance(config, dict) else None


def load_cost(model_path: str | None) -> tuple[ModelCost, str]:
    """(cost model, where it comes from). Falls back on `stand_in` with a warning. Blocks."""
    if model_path:
        config = read_config(model_path)
        if config is not None:
            try:
                return ModelCost.from_config(config), model_path
            except UnsupportedModelError as error:
                logger.warning("FLOPs are estimated by a stand-in model: %s", error)
                return stand_in(), "stand-in: unsupported model"
    logger.warning("FLOPs are estimated by a stand-in model: no config.json for %s (--model-path)", model_path)
    return stand_in(), "stand-in: no config.json"
