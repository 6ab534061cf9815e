"""The pieces of the conversion on small random tensors."""

from __future__ import annotations

import torch

from asyncep.demo.clustering import assign_neurons
from asyncep.demo.refit import _RIDGE, refit_down
from asyncep.demo.routing import expert_energies, fit_router, gates


def test_clusters_are_balanced_and_find_neurons_that_fire_together() -> None:
    generator = torch.Generator().manual_seed(0)
    group = torch.randperm(64, generator=generator) % 4
    fires = torch.rand(512, 4, generator=generator) < 0.3
    activity = fires[:, group] * (1 + torch.rand(512, 64, generator=generator))
    assignment = assign_neurons(activity, experts=4, always_useful=0, generator=generator)
    assert torch.bincount(assignment).tolist() == [16] * 4
    assert all(len(group[assignment == expert].unique()) == 1 for expert in range(4))


def test_energies_are_the_experts_output_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(7, 12, generator=generator)
    down = torch.randn(5, 12, generator=generator)
    assignment = torch.arange(12) % 3
    energies = expert_energies(activations, down, assignment)
    for expert in range(3):
        mine = assignment == expert
        expected = (activations[:, mine] @ down[:, mine].T).pow(2).sum(1)
        torch.testing.assert_close(energies[:, expert], expected)


def test_router_finds_the_largest_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 16, generator=generator)
    energies = (inputs @ torch.randn(16, 8, generator=generator)).exp()
    router = fit_router(inputs, energies, torch.ones(2000))
    gate = gates(inputs, router, top_k=3)
    assert torch.equal((gate > 0).sum(1), torch.full((2000,), 3))
    torch.testing.assert_close(gate.sum(1), torch.ones(2000))
    captured = (energies * (gate > 0)).sum() / energies.topk(3, dim=1).values.sum()
    assert captured > 0.95


def test_refit_moves_towards_the_map_and_leaves_unseen_neurons_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted, start = torch.randn(4, 10, generator=generator), torch.randn(4, 10, generator=generator)
    gated = torch.randn(3000, 10, generator=generator)
    gated[:, 7] = 0
    refitted = refit_down(start, gated, gated @ wanted.T, torch.ones(3000))
    seen = torch.arange(10) != 7
    # Independent inputs: the ridge only shortens the step, by the same factor for each neuron.
    expected = start + (wanted - start) / (1 + _RIDGE)
    torch.testing.assert_close(refitted[:, seen], expected[:, seen], atol=0.1, rtol=0)
    torch.testing.assert_close(refitted[:, 7], start[:, 7])
