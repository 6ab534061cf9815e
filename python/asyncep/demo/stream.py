"""The residual stream of many prompts with a common prefix, advanced by hand, one layer at a time.

Conversion needs two of them side by side: what the dense model computes, and what the layers converted so
far make of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from asyncep.demo.reference import common_prefix_length, right_padded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Rope = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts split into the shared prefix [1, P] and their continuations [B, L], padded on the right."""

    prefix: torch.Tensor
    tails: torch.Tensor
    valid: torch.Tensor  # [B, L]: False on padding
    closing: torch.Tensor  # [B, L]: True on the last tokens, those that all prompts end with

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> PromptBatch:
        shared = common_prefix_length(prompts)
        tails = [list(prompt[shared:]) for prompt in prompts]
        lengths = torch.tensor([len(tail) for tail in tails])
        padded = right_padded(tails)
        position = torch.arange(padded.shape[1])[None]
        valid = position < lengths[:, None]
        common_end = common_prefix_length([tail[::-1] for tail in tails])
        closing = valid & (position >= lengths[:, None] - common_end)
        return cls(torch.tensor([list(prompts[0][:shared])]), padded, valid, closing)

    @property
    def prefix_tokens(self) -> int:
        return int(self.prefix.shape[1])


class Stream:
    """Hidden states of one model over a :class:`PromptBatch`; starts at the embeddings."""

    def __init__(self, model: Any, batch: PromptBatch) -> None:
        self.batch = batch
        self.prefix = model.model.embed_tokens(batch.prefix)
        self.tails = model.model.embed_tokens(batch.tails)
        before, length = batch.prefix_tokens, batch.tails.shape[1]
        rotary = model.model.rotary_emb
        self._rope_prefix: Rope = rotary(self.prefix, torch.arange(before)[None])
        self._rope_tails: Rope = rotary(self.tails, torch.arange(before, before + length)[None])
        self._tails_see = torch.ones(length, before + length, dtype=torch.bool).tril(before)

    def attend(self, layer: Any) -> None:
        """Add the attention block of ``layer``; continuations read the prefix's keys and values."""
        rows = self.tails.shape[0]
        out, keys, values = _attention(layer, self.prefix, self._rope_prefix, None, None)
        past = (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
        tails_out, _, _ = _attention(layer, self.tails, self._rope_tails, past, self._tails_see)
        self.prefix, self.tails = self.prefix + out, self.tails + tails_out

    def feed_forward(self, block: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add a feed-forward block (with its norm): [N, hidden] to the same, in the order of `tokens`."""
        self.add(block(self.tokens()))

    def add(self, output: torch.Tensor) -> None:
        """Add what a block made of `tokens`: [N, hidden]. Padding stays as it was: nothing reads it."""
        before = self.batch.prefix_tokens
        self.prefix = self.prefix + output[:before]
        self.tails = self.tails.clone()
        self.tails[self.batch.valid] += output[before:]

    def tokens(self) -> torch.Tensor:
        """Every real token once, the prefix first: [N, hidden]."""
        return torch.cat([self.prefix[0], self.tails[self.batch.valid]])


def _attention(
    layer: Any,
    hidden: torch.Tensor,
    rope: Rope,
    past: tuple[torch.Tensor, torch.Tensor] | None,
    visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grouped-query attention of a Llama layer: output, keys and values of these tokens."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    block = layer.self_attn
    normed = layer.input_layernorm(hidden)
    rows, length, _ = normed.shape
    query, key, value = (
        projection(normed).view(rows, length, -1, block.head_dim).transpose(1, 2)
        for projection in (block.q_proj, block.k_proj, block.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rope)
    all_keys, all_values = key, value
    if past is not None:
        all_keys, all_values = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    mixed = functional.scaled_dot_product_attention(
        query, all_keys, all_values, attn_mask=visible, is_causal=visible is None, enable_gqa=True
    )
    return block.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1)), key, value
