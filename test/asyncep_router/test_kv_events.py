"""Our event types read what SGLang's write."""

from __future__ import annotations

import msgspec
import pytest

from asyncep_router.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decode_batch, on_device

theirs = pytest.importorskip("sglang.srt.disaggregation.kv_events")


def test_contract_with_sglangs_event_encoding() -> None:
    batch = theirs.KVEventBatch(
        ts=1.5,
        events=[
            theirs.BlockStored([1, -2], None, [5, 6, 7, 8], 2, None, medium=theirs.StorageMedium.GPU),
            theirs.BlockRemoved([-2], medium=theirs.StorageMedium.CPU),
            theirs.AllBlocksCleared(),
        ],
        attn_dp_rank=3,
    )
    decoded = decode_batch(msgspec.msgpack.encode(batch))
    stored, removed, cleared = decoded.events
    assert decoded.attn_dp_rank == 3
    assert stored == BlockStored([1, -2], None, [5, 6, 7, 8], 2, medium="GPU")
    assert removed == BlockRemoved([-2], medium="CPU_PINNED")
    assert cleared == AllBlocksCleared()
    assert isinstance(stored, BlockStored)
    assert on_device(stored)
    assert isinstance(removed, BlockRemoved)
    assert not on_device(removed)
