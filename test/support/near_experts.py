"""Transformers' answers to a prompt, with every choice its routers could as well have made.

In bf16 a router now and then takes the other of two experts that are nearly equal, and the answer is then another
one altogether: as right as the first, and far from it. Which choices are open is read from the routers, not from the
answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def routers(net: Any) -> list[Any]:
    """The routers, first layer first. Their output: logits ``(T, E)``, weights ``(T, k)``, experts ``(T, k)``."""
    return [module for module in net.modules() if type(module).__name__.endswith("TopKRouter")]


@contextmanager
def hooked(modules: Sequence[Any], hook: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def router_logits(net: Any, prompt: Sequence[int]) -> torch.Tensor:
    """``(layers, E)`` fp32: of the last token."""
    seen = []
    with hooked(routers(net), lambda _module, _given, output: seen.append(output[0][-1].float())), torch.no_grad():
        net(torch.tensor([prompt]))
    return torch.stack(seen)


def take_the_next(router: Any, _given: Any, output: Any) -> Any:
    """A forward hook: the last token gets the first expert that was not chosen instead of the last that was."""
    logits, weights, experts = output
    k = experts.shape[1]
    probabilities = logits[-1].float().softmax(-1)
    order = probabilities.argsort(descending=True)
    chosen = torch.cat((order[: k - 1], order[k : k + 1]))
    found = probabilities[chosen]
    if getattr(router, "norm_topk_prob", True):
        found = found / found.sum()
    weights, experts = weights.clone(), experts.clone()
    weights[-1], experts[-1] = found.to(weights.dtype), chosen
    return logits, weights, experts


def answers(net: Any, prompt: Sequence[int], labels: Sequence[int], near: float) -> torch.Tensor:
    """``(answers, labels)`` fp32 log-probabilities; the first is the one Transformers gives.

    Args:
        near: two experts of the last token are nearly equal if their logits are less than this apart.
    """
    k = routers(net)[0].top_k
    ordered = router_logits(net, prompt).sort(dim=-1, descending=True).values
    open_layers = [router for router, row in zip(routers(net), ordered, strict=True) if row[k - 1] - row[k] < near]
    rows = []
    for count in range(len(open_layers) + 1):
        for others in itertools.combinations(open_layers, count):
            with hooked(others, take_the_next), torch.no_grad():
                rows.append(net(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)[list(labels)])
    return torch.stack(rows)
