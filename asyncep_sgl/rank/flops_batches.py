"""Prefill batches cut by FLOPs instead of tokens: as much as hides the gathers, and no more.

SGLang counts the tokens of a batch. A token after a long prefix costs more than one after none, and what a gather has
to hide behind is time, that is FLOPs. The token limits stay as the bound that memory sets.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from typing_extensions import override

from asyncep_router.cost import ModelCost


@functools.cache
def adder_class(cost: ModelCost, target: Callable[[], float]) -> type[PrefillAdder]:
    """A `PrefillAdder` that closes a batch at ``target()`` FLOPs and cuts longer prompts into pieces of at least that.

    A request is admitted whole while the batch is below the target and stays below twice the target with it: cutting it
    would cost a second pass over its prefix. A longer one is cut evenly, so that its last piece is no batch of little
    that cannot hide its gathers.
    """

    class FlopsPrefillAdder(PrefillAdder):  # type: ignore[misc] # upstream is untyped
        rem_chunk_tokens: int | None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.target_flops = float(target())
            self.flops = 0.0
            self._cut = False
            self._continued_after = 0

        @override
        def budget_state(self) -> Any:
            # SGLang keeps track of one unfinished prompt: a batch that has cut one takes nothing more.
            if self.can_run_list and (self._cut or self.flops >= self.target_flops):
                return AddReqResult.OTHER
            return super().budget_state()

        @override
        def _update_prefill_budget(self, prefix_len: int, extend_input_len: int, *args: Any, **kwargs: Any) -> None:
            # SGLang charges the next piece of a prompt as if nothing came before it.
            after = self._continued_after if kwargs.get("is_chunked_continuation") else prefix_len
            self.flops += cost.flops(extend_input_len, after)
            super()._update_prefill_budget(prefix_len, extend_input_len, *args, **kwargs)

        @override
        def _select_prefill_admission(self, req: Any, **kwargs: Any) -> Any:
            prefix = req.prefix_len + kwargs["host_hit_length"]
            return self._within(
                prefix,
                len(req.full_untruncated_fill_ids) - prefix,
                lambda: super(FlopsPrefillAdder, self)._select_prefill_admission(req, **kwargs),
            )

        @override
        def add_chunked_req(self, req: Any) -> Any:
            self._continued_after = req.prefix_len
            return self._within(
                req.prefix_len,
                len(req.full_untruncated_fill_ids) - req.prefix_len,
                lambda: super(FlopsPrefillAdder, self).add_chunked_req(req),
            )

        def _within(self, prefix: int, tokens: int, add: Callable[[], Any]) -> Any:
            """``add()`` with the chunk limit lowered for a request that makes several batches with what is there."""
            limit = self.rem_chunk_tokens
            whole = self.flops + cost.flops(tokens, prefix)
            pieces = whole // self.target_flops
            if limit is None or pieces < 2:
                return add()
            piece = cost.tokens_within(whole / pieces - self.flops, prefix)
            lowered = min(limit, max(self.page_size, piece))
            self.rem_chunk_tokens = lowered
            self._cut = True
            try:
                return add()
            finally:
                # What was charged meanwhile stays charged.
                self.rem_chunk_tokens = (self.rem_chunk_tokens or 0) + limit - lowered

    return FlopsPrefillAdder
