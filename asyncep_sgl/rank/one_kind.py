"""Prefill batches of one kind: requests that ask for a token and requests that ask for none are not computed together.

SGLang leaves sampling out of a batch only if none of its requests asks for a token. One that does would give a token,
and its log-probability, to all the others too.
"""

from __future__ import annotations

import functools
from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from typing_extensions import override


@functools.lru_cache(maxsize=4)
def one_kind(chosen: type[PrefillAdder]) -> type[PrefillAdder]:
    """A class of adders like ``chosen`` that closes a batch before a request of the other kind."""

    class OneKindAdder(chosen):  # type: ignore[misc] # upstream is untyped
        can_run_list: list[Any]

        @override
        def add_one_req(self, req: Any, *args: Any, **kwargs: Any) -> Any:
            if self.can_run_list and self.can_run_list[0].is_prefill_only != req.is_prefill_only:
                return AddReqResult.OTHER
            return super().add_one_req(req, *args, **kwargs)

    return OneKindAdder
