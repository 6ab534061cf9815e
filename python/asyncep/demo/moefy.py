"""From dense to Mixture-of-Experts: each feed-forward layer's neurons become experts behind a router.

Layers are converted in order. The dense model and the model converted so far run side by side on real
prompts; the down projections of each layer are refitted so that the converted residual stream returns to
the dense one, which also repairs what earlier layers lost.

All of it in fp32, also where the model is served in bf16: what is fitted is a small difference of two streams. With
bf16 the converted model was three times further from the dense one on one kind of CPU than on another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from asyncep.demo.clustering import assign_neurons
from asyncep.demo.refit import refit_down
from asyncep.demo.routing import expert_energies, fit_router, gates
from asyncep.demo.stream import PromptBatch, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# The shared prefix is one sequence in fitting and part of every request in use.
_PREFIX_WEIGHT = 3.0
# The question that ends every prompt is where the answer is read.
_CLOSING_WEIGHT = 4.0


@dataclass(frozen=True, slots=True)
class MoeShape:
    """How a feed-forward layer is split."""

    experts: int = 16
    top_k: int = 12
    always_useful: int = 2  # experts made of the most active neurons


@dataclass(frozen=True)
class MoeLayer:
    """One converted layer: neurons in their old order, each with its expert."""

    assignment: torch.Tensor  # [neurons]
    router: torch.Tensor  # [experts, hidden]
    down: torch.Tensor  # [hidden, neurons], scaled so that the gates' sum of one replaces a plain sum
    load: torch.Tensor  # [experts]: tokens that chose each expert in fitting, the prefix not counted


def convert_exact(model: Any, prompts: Sequence[Sequence[int]], shape: MoeShape, seed: int) -> list[MoeLayer]:
    """Every expert active with gate 1/experts: the dense model, its neurons only rearranged."""
    generator = torch.Generator().manual_seed(seed)
    batch = PromptBatch.of(prompts)
    layers = []
    with torch.no_grad():
        stream = Stream(model, batch)
        for dense in model.model.layers:
            stream.attend(dense)
            inputs = dense.post_attention_layernorm(stream.tokens())
            down = dense.mlp.down_proj.weight
            contributions = _activations(dense, inputs).abs() * down.norm(dim=0)
            assignment = assign_neurons(
                contributions, experts=shape.experts, always_useful=shape.always_useful, generator=generator
            )
            router = torch.zeros(shape.experts, inputs.shape[-1])
            load = torch.full((shape.experts,), float(len(inputs)))
            layers.append(MoeLayer(assignment, router, down * shape.experts, load))
            stream.feed_forward(_dense_block(dense))
    return layers


def convert_sparse(
    model: Any,
    prompts: Sequence[Sequence[int]],
    shape: MoeShape,
    seed: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[MoeLayer]:
    """``top_k`` of the experts active, routers and down projections fitted on ``prompts``."""
    generator = torch.Generator().manual_seed(seed)
    batch = PromptBatch.of(prompts)
    repeats = _token_weights(batch)
    layers: list[MoeLayer] = []
    with torch.no_grad():
        reference, stream = Stream(model, batch), Stream(model, batch)
        for index, dense in enumerate(model.model.layers):
            reference.attend(dense)
            stream.attend(dense)
            reference.feed_forward(_dense_block(dense))
            layer, output = _convert_layer(
                dense, stream.tokens(), reference.tokens(), repeats, shape, generator, batch.prefix_tokens
            )
            layers.append(layer)
            stream.add(output)
            progress(index + 1, len(model.model.layers))
    return layers


def _convert_layer(
    dense: Any,
    before: torch.Tensor,
    wanted: torch.Tensor,
    repeats: torch.Tensor,
    shape: MoeShape,
    generator: torch.Generator,
    prefix_tokens: int,
) -> tuple[MoeLayer, torch.Tensor]:
    """Convert one layer, whose input stream is ``before`` and output should be ``wanted``: [N, hidden].

    Returns:
        The layer, and what it adds to the stream: [N, hidden].
    """
    inputs = dense.post_attention_layernorm(before)
    activations = _activations(dense, inputs)
    down = dense.mlp.down_proj.weight
    # The next norm divides by the stream's size, so errors count relative to it.
    weights = repeats / wanted.pow(2).mean(1)

    assignment = assign_neurons(
        activations.abs() * down.norm(dim=0),
        experts=shape.experts,
        always_useful=shape.always_useful,
        generator=generator,
    )
    energies = expert_energies(activations, down, assignment)
    router = fit_router(inputs, energies, weights)
    gate = gates(inputs, router, shape.top_k)
    gated = activations * gate[:, assignment]
    down = refit_down(down * shape.top_k, gated, wanted - before, weights)
    load = (gate[prefix_tokens:] > 0).sum(0).float()
    return MoeLayer(assignment, router, down, load), gated @ down.T


def _token_weights(batch: PromptBatch) -> torch.Tensor:
    """How much each token counts in fitting, in the order of ``Stream.tokens``: [N]."""
    tails = torch.where(batch.closing, _CLOSING_WEIGHT, 1.0)[batch.valid]
    return torch.cat([torch.full((batch.prefix_tokens,), _PREFIX_WEIGHT), tails])


def _activations(dense: Any, normed: torch.Tensor) -> torch.Tensor:
    """The feed-forward layer's neurons: silu(gate) * up, [..., neurons]."""
    return functional.silu(dense.mlp.gate_proj(normed)) * dense.mlp.up_proj(normed)


def _dense_block(dense: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: dense.mlp(dense.post_attention_layernorm(hidden))
