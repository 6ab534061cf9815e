"""A pass over one token, which a rank that has come back computes before it gets requests."""

from __future__ import annotations

import uuid
from array import array
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams

_TOKEN = 0


def probe(embeds: bool) -> Any:
    """A request that SGLang takes for a check of health: nobody waits for its answer.

    Args:
        embeds: the model is served for embeddings.
    """
    common: dict[str, Any] = {
        "rid": f"{HEALTH_CHECK_RID_PREFIX}_{uuid.uuid4().hex}",
        "input_text": None,
        "input_ids": array("q", [_TOKEN]),
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": _sampling(),
    }
    if embeds:
        return TokenizedEmbeddingReqInput(**common)
    return TokenizedGenerateReqInput(
        **common,
        input_embeds=None,
        return_logprob=False,
        logprob_start_len=-1,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
    )


def _sampling() -> SamplingParams:
    sampling = SamplingParams(max_new_tokens=0, temperature=0.0)
    sampling.normalize(None)
    return sampling
