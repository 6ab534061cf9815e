"""Label scores with transformers: what the served model's answers are compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from asyncep.demo.task import TaskPrompts, accuracy, calibration_articles, label_offsets, predict
from asyncep.demo.weights import load_dense, load_tokenizer, working_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asyncep.demo.news import Article


def dense_reference_accuracy(articles: Sequence[Article], *, batch_size: int = 8) -> float:
    """The dense model's calibrated accuracy on ``articles``, on the very prompts that are served."""
    return model_accuracy(load_dense(torch.bfloat16).to(working_dtype()), articles, batch_size=batch_size)


def model_accuracy(model: Any, articles: Sequence[Article], *, batch_size: int = 8) -> float:
    """The calibrated accuracy of any causal language model of transformers with SmolLM2's tokenizer."""
    return accuracy(model_predictions(model, articles, batch_size=batch_size), articles)


def model_predictions(model: Any, articles: Sequence[Article], *, batch_size: int = 8) -> list[str]:
    """One topic per article; the model's label offsets are measured in the same call."""
    prompts = TaskPrompts.create(load_tokenizer())
    calibration = calibration_articles()
    token_ids = prompts.token_ids([*calibration, *articles])
    scores = label_log_probs(model, token_ids, prompts.label_token_ids(), batch_size=batch_size).tolist()
    return predict(scores[len(calibration) :], label_offsets(scores[: len(calibration)]))


def label_log_probs(
    model: Any, prompts: Sequence[Sequence[int]], label_ids: Sequence[int], *, batch_size: int = 8
) -> torch.Tensor:
    """Log-probability of each label as the next token: [prompts, labels], float32.

    What all prompts begin with is computed once. The rest runs in batches of similar length, padded on the
    right: attention is causal, so padding cannot reach the positions before it, and no mask is needed.
    """
    shared = common_prefix_length(prompts)
    scores = torch.empty(len(prompts), len(label_ids))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with torch.inference_mode():
        prefix = torch.tensor([list(prompts[0][:shared])])
        cache = model.model(prefix, use_cache=True).past_key_values if shared else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tails = [list(prompts[index][shared:]) for index in rows]
            hidden = model.model(
                right_padded(tails), past_key_values=_repeated(cache, len(rows)), use_cache=True
            ).last_hidden_state
            last = hidden[torch.arange(len(rows)), torch.tensor([len(tail) - 1 for tail in tails])]
            log_probs = torch.log_softmax(model.lm_head(last).float(), dim=-1)
            scores[torch.tensor(rows)] = log_probs[:, list(label_ids)]
    return scores


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share, leaving each at least one token of its own."""
    ordered = sorted(list(prompt) for prompt in prompts)
    first, last = ordered[0], ordered[-1]  # the two that differ earliest
    limit = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def right_padded(rows: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
    """Token ids of unequal length as one tensor: [rows, longest]."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def _repeated(cache: Any, rows: int) -> Any:
    """A fresh key-value cache that holds the one-row ``cache`` for each of ``rows`` sequences."""
    from transformers import DynamicCache

    if cache is None:
        return None
    repeated = DynamicCache()
    for index, layer in enumerate(cache.layers):
        repeated.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), index)
    return repeated
