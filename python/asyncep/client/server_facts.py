"""What a server says about itself, as far as planning needs it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncep.client.errors import RejectedError, ServerError
from asyncep.client.generate import ServerApi
from asyncep.client.plan import Cost, TokenCost
from asyncep_router.cost import ModelCost
from asyncep_router.errors import ConfigError, UnsupportedModelError

# T where the server has no router that could tell: FLOPs of so many tokens, the router's own default.
_DEFAULT_THRESHOLD_TOKENS = 2048
# What only our servers have, or only routers.
_EXTRAS = ("/router/state", "/workers", "/asyncep/status")


@dataclass(frozen=True)
class ServerFacts:
    """One server.

    Attributes:
        ranks: ranks behind it.
        addressable: a request can name its rank (`routed_dp_rank`).
        page: tokens in a page of the prefix cache.
        most_tokens: tokens a prompt may have; None if not said.
        tokenizer: its tokenizer's folder or name, as it sees it.
        model: the same for its model.
        cost: what passes cost; tokens where the model's configuration is out of reach.
        threshold: FLOPs a batch has to reach (in the unit of `cost`): T, or what computes well if that is more.
        priorities: requests with a priority below 0 wait there for others; a stock server might refuse them.
    """

    ranks: int
    addressable: bool
    page: int
    most_tokens: int | None
    tokenizer: str | None
    model: str
    cost: Cost
    threshold: int
    priorities: bool = False

    @property
    def counts_flops(self) -> bool:
        """Whether `cost` is in FLOPs, not tokens."""
        return isinstance(self.cost, ModelCost)


async def ask_server(client: ServerApi) -> ServerFacts:
    """Asks.

    Raises:
        ServerError: it cannot be reached, or is none of SGLang's kind.
    """
    paths = ("/server_info", "/model_info")
    # All at once: one that is not answered is not to cost its time twice.
    questions = [*(client.get(path) for path in paths), *(_if_there(client, path) for path in _EXTRAS)]
    info, about, state, workers, status = await asyncio.gather(*questions, return_exceptions=True)
    for answer, path in zip((info, about, state, workers, status), (*paths, *_EXTRAS), strict=True):
        if isinstance(answer, RejectedError) and answer.status in (401, 403):
            raise ServerError(f"{client.url}: refuses the key, or wants one: give api_key (--api-key)") from answer
        if isinstance(answer, RejectedError):
            raise ServerError(f"{client.url}: not a server of SGLang's kind: {answer}") from answer
        if isinstance(answer, BaseException):
            raise answer
        if not isinstance(answer, dict):
            raise ServerError(f"{client.url}: not a server of SGLang's kind: {path} is {str(answer)[:100]!r}")
    try:
        return _facts(info, about, state, workers, ours=bool(state or status))
    except (TypeError, ValueError, AttributeError) as error:
        raise ServerError(f"{client.url}: not a server of SGLang's kind: /server_info: {error}") from error


def _facts(info: Any, about: Any, state: Any, workers: Any, *, ours: bool) -> ServerFacts:
    model = str(about.get("model_path", ""))
    cost = cost_of(model)
    threshold = _threshold(state) if isinstance(cost, ModelCost) else None
    most = info.get("max_req_input_len")
    ranks = int(info.get("dp_size") or 1)
    # An HTTP router answers for one of its workers; it knows better than we where a request belongs.
    routed = isinstance(workers.get("workers"), list)
    return ServerFacts(
        ranks=ranks * max(1, len(workers["workers"])) if routed else ranks,
        addressable=ranks > 1 and not routed,
        page=int(info.get("page_size") or 1),
        # SGLang takes fewer than the number it names.
        most_tokens=int(most) - 1 if most else None,
        tokenizer=about.get("tokenizer_path"),
        model=model,
        cost=cost,
        threshold=threshold or cost.flops(_DEFAULT_THRESHOLD_TOKENS),
        # Ranks that schedule by it, or refuse it, have an order of their own.
        priorities=ours
        and not info.get("enable_priority_scheduling")
        and not info.get("abort_on_priority_when_disabled"),
    )


async def _if_there(client: ServerApi, path: str) -> dict[str, Any]:
    """The answer of an endpoint that not every server has; empty without one."""
    try:
        found = await client.get(path)
    except (RejectedError, ServerError):
        return {}
    return found if isinstance(found, dict) else {}


def _threshold(state: dict[str, Any]) -> int | None:
    """The FLOPs of a batch as a router says it: the largest of its ranks'."""
    ranks = state.get("ranks") or {}
    if not isinstance(ranks, dict):
        ranks = (state.get("placement") or {}).get("ranks") or {}
    return (
        max((int(rank.get("batch_flops") or rank.get("threshold_flops") or 0) for rank in ranks.values()), default=0)
        or None
    )


def cost_of(model: str) -> Cost:
    """The cost model of a checkpoint folder on this host; tokens if it is not here or of an unknown architecture."""
    from asyncep_sgl.config.model_support import read_config
    from asyncep_sgl.errors import AsyncEPError

    if not Path(model).is_dir():
        return TokenCost()
    try:
        return ModelCost.from_config(read_config(model))
    except (AsyncEPError, ConfigError, UnsupportedModelError):
        return TokenCost()
