"""Which neurons of a feed-forward layer form an expert: those that are large on the same tokens.

The neurons with the largest mean contribution fill the first ``always_useful`` experts, which most tokens
then choose; the rest are clustered. Every expert gets the same number of neurons.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_SKETCH = 128  # co-activation profiles are projected to so many dimensions
_ROUNDS = 5
_TOKENS = 2048


def assign_neurons(
    contributions: torch.Tensor, *, experts: int, always_useful: int, generator: torch.Generator
) -> torch.Tensor:
    """The expert of each neuron, [neurons], from the size of its output on each token, [tokens, neurons]."""
    tokens, neurons = contributions.shape
    if neurons % experts:
        raise ValueError(f"{neurons} neurons do not divide into {experts} experts")
    size = neurons // experts
    by_size = contributions.mean(0).argsort(descending=True)
    top, rest = by_size[: always_useful * size], by_size[always_useful * size :]
    assignment = torch.empty(neurons, dtype=torch.long)
    assignment[top] = torch.arange(always_useful).repeat_interleave(size)
    if len(rest):
        sample = torch.randperm(tokens, generator=generator)[:_TOKENS]
        profiles = _profiles(contributions[sample][:, rest], generator)
        assignment[rest] = always_useful + _balanced_kmeans(profiles, experts - always_useful, generator)
    return assignment


def _profiles(contributions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """When each neuron is unusually active, as a unit vector: [neurons, sketch]."""
    activity = contributions.sqrt()  # keeps a few outlier tokens from deciding everything
    activity = activity - activity.mean(1, keepdim=True)
    activity = activity - activity.mean(0)
    sketch = torch.randn(_SKETCH, activity.shape[0], generator=generator)
    return functional.normalize((sketch @ functional.normalize(activity, dim=0)).T, dim=1)


def _balanced_kmeans(points: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    centres = points[torch.randperm(len(points), generator=generator)[:clusters]]
    assignment = _balanced_assignment(points @ centres.T)
    for _ in range(_ROUNDS - 1):
        centres = torch.stack([points[assignment == c].mean(0) for c in range(clusters)])
        assignment = _balanced_assignment(points @ functional.normalize(centres, dim=1).T)
    return assignment


def _balanced_assignment(similarity: torch.Tensor) -> torch.Tensor:
    """Greedy: the best remaining (point, cluster) pair first, until each cluster is full. [points]"""
    points, clusters = similarity.shape
    room = [points // clusters] * clusters
    assignment = [-1] * points
    for pair in similarity.flatten().argsort(descending=True).tolist():
        point, cluster = divmod(pair, clusters)
        if assignment[point] < 0 and room[cluster]:
            assignment[point] = cluster
            room[cluster] -= 1
    return torch.tensor(assignment)
