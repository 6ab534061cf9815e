"""The oracle of the conversion: with every expert active, the model is the dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncep.demo.news import sample_articles
from asyncep.demo.task import TaskPrompts
from asyncep.demo.weights import load_dense

if TYPE_CHECKING:
    from pathlib import Path

# The dense model is rounded to bf16 as the checkpoint is, and scaling by 16 experts is exact; what remains
# is the order of float32 sums. Measured: 6e-5 on logits up to 38.
TOLERANCE = 5e-4


def test_exact_variant_reproduces_the_dense_logits(exact_model: Path) -> None:
    dense = load_dense(torch.bfloat16).float()
    moe = AutoModelForCausalLM.from_pretrained(exact_model, dtype=torch.float32)
    assert type(moe).__name__ == "MixtralForCausalLM"
    assert moe.config.num_experts_per_tok == moe.config.num_local_experts == 16
    prompts = TaskPrompts.create(AutoTokenizer.from_pretrained(exact_model))
    token_ids = torch.tensor([prompts.token_ids(sample_articles("evaluate", 1))[0][-200:]])
    with torch.inference_mode():
        torch.testing.assert_close(moe(token_ids).logits, dense(token_ids).logits, atol=TOLERANCE, rtol=0)
