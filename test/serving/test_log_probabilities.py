"""The served model's log-probabilities against Transformers on the same weights, for every architecture and dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from near_experts import answers, router_logits
from server import Server
from transformers import AutoModelForCausalLM

LABELS = [3, 17, 101, 256, 511]
PROMPTS = [
    [(7 * i + 13 * k) % (tiny_models.VOCABULARY - 3) + 3 for i in range(length)]
    for k, length in enumerate((5, 33, 64, 200))
]

# fp32: sums in another order. Logits are of order 10, rounding is 1e-7 of a term, some hundred terms deep.
FP32_TOLERANCE = 2e-4


def load(model: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()


def reference(model: Path, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' log-probabilities, shape (prompts, labels), fp32."""
    net = load(model, dtype)
    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            logits = net(torch.tensor([prompt])).logits[0, -1].float()
            rows.append(logits.log_softmax(-1)[LABELS])
    return torch.stack(rows)


@pytest.mark.server
@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_served_equals_transformers(
    architecture: str, dtype: str, tiny_model: Callable[[str], Path], serve: Callable[..., Server]
) -> None:
    model = tiny_model(architecture)
    server = serve(model, "--dtype", dtype)
    try:
        served = torch.tensor(server.log_probabilities(PROMPTS, LABELS))
    finally:
        server.stop()
    exact = reference(model, torch.float32)
    if dtype == "float32":
        assert (served - exact).abs().max() < FP32_TOLERANCE
        return
    # bf16: eight bits of mantissa through every layer, and a router that may take the other of two near-equal experts.
    # How much that is depends on the model, so the yardstick is what bf16 does to Transformers itself: to its answers,
    # and to its routers' logits. Each answer is compared with the nearest of those that the routers leave open.
    exact_net, own_net = load(model, torch.float32), load(model, torch.bfloat16)
    moved = [(router_logits(exact_net, p) - router_logits(own_net, p)).abs().max().item() for p in PROMPTS]
    # Each of two logits moves, here as much as there.
    possible = [answers(exact_net, prompt, LABELS, near=2 * 2 * max(moved)) for prompt in PROMPTS]
    own = reference(model, torch.bfloat16)
    error, own_error = (
        max((rows - row).abs().amax(dim=1).min().item() for rows, row in zip(possible, found, strict=True))
        for found in (served, own)
    )
    assert error < 2 * own_error + 0.01


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_sensitivity(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    """Were one expert of one layer not loaded, these prompts would show it: the test above can fail."""
    net = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), dtype=torch.float32).eval()
    prompt = torch.tensor([max(PROMPTS, key=len)])
    with torch.no_grad():
        before = net(prompt).logits[0, -1].log_softmax(-1)[LABELS]
        experts = [p for name, p in net.named_parameters() if "experts." in name and name.endswith("down_proj")]
        assert experts, "no expert parameters found by name"
        experts[-1].data[0].zero_()
        for parameter in experts:
            parameter.data[1].zero_()
        after = net(prompt).logits[0, -1].log_softmax(-1)[LABELS]
    assert (before - after).abs().max() > 100 * FP32_TOLERANCE
