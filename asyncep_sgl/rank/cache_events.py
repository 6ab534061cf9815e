"""SGLang's cache events, with the pages of one prompt told at once. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from sglang.srt.disaggregation.kv_events import BlockStored

_CONTENTS = ("block_hashes", "parent_block_hash", "token_ids")
_SAME = tuple(field for field in BlockStored.__struct_fields__ if field not in _CONTENTS)


def joined(events: Iterable[Any]) -> list[Any]:
    """The same changes with each run of pages, one event a page as SGLang makes them, as one event.

    A page joins the event before it if it continues it and agrees with it in all else; order stays.
    """
    found: list[Any] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, BlockStored) and isinstance(last, BlockStored) and _continues(event, last):
            last.block_hashes.extend(event.block_hashes)
            last.token_ids.extend(event.token_ids)
        elif isinstance(event, BlockStored):
            # A copy: the lists of a joined event grow, and these are SGLang's.
            tokens, hashes = list(event.token_ids), list(event.block_hashes)
            found.append(msgspec.structs.replace(event, token_ids=tokens, block_hashes=hashes))
        else:
            found.append(event)
    return found


def _continues(event: Any, last: Any) -> bool:
    return bool(
        last.block_hashes
        and event.parent_block_hash == last.block_hashes[-1]
        and all(getattr(event, field) == getattr(last, field) for field in _SAME)
    )
