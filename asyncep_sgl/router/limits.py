"""What the router inside the engine may give a rank, from the server's configuration. Pure."""

from __future__ import annotations

import math

from asyncep_router.config import Limits
from asyncep_router.cost import ModelCost

# T of a host that gathers nothing, in tokens: so little is not worth a second rank's batch.
SPREAD_TOKENS = 256
# As long as a rank computes so many tokens, it is busy with a request besides: taking it in, answering it.
TOKENS_A_REQUEST = 16


def limits_of(
    cost: ModelCost,
    *,
    tokens: int,
    max_wait: float,
    gathers: bool,
    on_gpu: bool,
    chunk_tokens: int,
    ranks_let_pass: bool,
) -> Limits:
    """The policy's settings.

    Args:
        tokens: of a batch that computes well (``--asyncep-threshold-tokens``).
        max_wait: seconds that little work may wait for company.
        gathers: ranks gather weights; T is then at least `tokens`.
        on_gpu: which wants larger batches than a core: those that SGLang makes, unless T says how large.
        chunk_tokens: of SGLang's batches.
        ranks_let_pass: they take their order from the router (`rank_order.py`).
    """
    saturating = tokens if gathers else min(tokens, SPREAD_TOKENS)
    batch = max(tokens, chunk_tokens) if on_gpu and not gathers else tokens
    return Limits(
        max_wait=max_wait,
        default_threshold=cost.flops(saturating),
        least_batch=cost.flops(batch),
        ranks_let_pass=ranks_let_pass,
        # Where gathers have to be hidden, FLOPs are what hides them.
        most_requests=math.inf if gathers else max(1, 2 * batch // TOKENS_A_REQUEST),
    )
