"""Prefill batches no larger than those the router counts in, so that nobody waits for more than it says.

SGLang fills a batch up to ``--chunked-prefill-size`` tokens, which may be all that the router has sent ahead. Here a
batch closes before it is more than one of the router's. One that a quick request is in takes bulk only up to half of
that, because the request waits for all of its batch. Prompts stay whole: one that is more is a batch by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from typing_extensions import override

from asyncep_router.cost import ModelCost
from asyncep_sgl.router.limits import TOKENS_A_REQUEST
from asyncep_sgl.router.rank_order import is_bulk

_SHARE_BESIDE_QUICK = 0.5


def share_of_batch(cost: ModelCost, tokens: int) -> Callable[[int, int], float]:
    """What says how much of a batch a request is, of its new and its cached tokens: by FLOPs or by tokens, whichever is
    more. FLOPs count what a long prefix adds; for short prompts tokens say better how long they take.

    Args:
        cost: the model's.
        tokens: of the one prompt that is a whole batch.
    """
    whole = cost.flops(tokens)
    return lambda new, cached: max(cost.flops(new, cached) / whole, max(new, TOKENS_A_REQUEST) / tokens)


@functools.cache
def bounded(cost: ModelCost, tokens: int) -> Callable[[type[PrefillAdder]], type[PrefillAdder]]:
    """What makes of a class of adders one that closes batches in time.

    Args:
        cost: the model's.
        tokens: of the one prompt that is a whole batch.
    """
    share = share_of_batch(cost, tokens)
    made: dict[type[PrefillAdder], type[PrefillAdder]] = {}

    def adder_class(chosen: type[PrefillAdder]) -> type[PrefillAdder]:
        if chosen not in made:
            made[chosen] = _bounded(chosen, share)
        return made[chosen]

    return adder_class


def _bounded(chosen: type[PrefillAdder], share: Callable[[int, int], float]) -> type[PrefillAdder]:
    class BoundedAdder(chosen):  # type: ignore[misc] # upstream is untyped
        can_run_list: list[Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._filled = 0.0
            self._counted = 0
            self._has_quick = False

        @override
        def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
            for added in self.can_run_list[self._counted :]:
                self._filled += share(added.extend_end - added.prefix_len, added.prefix_len)
                self._counted += 1
                self._has_quick |= not is_bulk(added.priority)
            if self._counted:
                mixed = self._has_quick and is_bulk(req.priority)
                more = share(len(req.full_untruncated_fill_ids) - req.prefix_len, req.prefix_len)
                if self._filled + more > (_SHARE_BESIDE_QUICK if mixed else 1.0):
                    return AddReqResult.OTHER
            return super().add_one_req(req, *args, **kwargs)

    return BoundedAdder
