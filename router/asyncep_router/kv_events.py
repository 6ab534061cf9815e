"""KV-cache events as SGLang's schedulers publish them, decoded without importing SGLang.

Wire format (sglang/srt/disaggregation/kv_events.py, 0.5.23): ZeroMQ frames [topic, sequence as 8 bytes
big-endian, payload]; the payload is msgpack `[ts, events, attn_dp_rank]`, every event a map tagged by
its class name under "type". `test_kv_events.py` encodes with SGLang's classes and decodes with ours.
"""

from __future__ import annotations

import msgspec

from asyncep_router.frames import decoded


class BlockStored(msgspec.Struct, tag=True, frozen=True):
    """Blocks now held; `token_ids` covers all of `block_hashes`, which continue `parent_block_hash`."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    medium: str | None = None
    cache_salt: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, frozen=True):
    """Blocks no longer held. A removed block takes everything that continues it along."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, frozen=True):
    """The cache was flushed."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KVEventBatch(msgspec.Struct, array_like=True, frozen=True):
    """One publication of one rank; `ts` is the rank's clock, seconds."""

    ts: float
    events: list[KVEvent]
    attn_dp_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(KVEventBatch)

DEVICE_MEDIUM = "GPU"
"""The tier that a prefill reads without loading first; SGLang names it so on every device."""


def decode_batch(payload: bytes) -> KVEventBatch:
    """Decode the third frame. Raises `msgspec.DecodeError` on anything else."""
    return decoded(_decoder, payload)


def on_device(event: BlockStored | BlockRemoved) -> bool:
    """Whether the event is about the device's own tier (host and disk tiers report here too)."""
    return event.medium in (None, DEVICE_MEDIUM)
