"""The router of one converted layer: a linear map that finds the experts with the largest outputs."""

from __future__ import annotations

import torch

# The spread of the router's logits. Gates within a per cent or so of 1/top_k keep the sum of the chosen
# experts; a spread of exactly zero would make the choice arbitrary.
_LOGIT_SPREAD = 0.02
_RIDGE = 1e-2


def expert_energies(activations: torch.Tensor, down: torch.Tensor, assignment: torch.Tensor) -> torch.Tensor:
    """Squared norm of every expert's output, [tokens, experts].

    ``activations`` [tokens, neurons], ``down`` [hidden, neurons], ``assignment`` [neurons].
    """
    columns = []
    for expert in range(int(assignment.max()) + 1):
        mine = assignment == expert
        inputs, weight = activations[:, mine], down[:, mine]
        columns.append(((inputs @ (weight.T @ weight)) * inputs).sum(1))
    return torch.stack(columns, dim=1).clamp_min(0)


def fit_router(inputs: torch.Tensor, energies: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Router [experts, hidden] by weighted ridge regression of the experts' log energies, centred per token.

    ``inputs`` [tokens, hidden], ``energies`` [tokens, experts], ``weights`` [tokens].
    """
    target = (energies + 1e-12).log()
    target = target - target.mean(1, keepdim=True)
    root = weights.sqrt()[:, None]
    weighted = inputs * root
    gram = weighted.T @ weighted
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    router = torch.linalg.solve(gram, weighted.T @ (target * root)).T
    return router * (_LOGIT_SPREAD / (inputs @ router.T).std())


def gates(inputs: torch.Tensor, router: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mixtral's gates, zero where an expert is not chosen: [..., experts], each row summing to one."""
    chosen = torch.softmax((inputs @ router.T).float(), dim=-1).topk(top_k, dim=-1)
    share = chosen.values / chosen.values.sum(-1, keepdim=True)
    return torch.zeros(*inputs.shape[:-1], len(router)).scatter_(-1, chosen.indices, share)
