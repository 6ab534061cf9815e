"""What a rank tells the router beside its replies: batches done, cache changes. Frames, no sockets."""

from __future__ import annotations

import msgspec

from asyncep_router.frames import decoded


class Finished(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """A batch is done.

    Attributes:
        rank: who computed it.
        rids: its requests that are finished now (a prompt in chunks is reported with its last).
        flops: by the cost model, from the tokens the batch really computed.
        seconds: from the launch of the batch until its results were out.
        cached: prompt tokens each request found in the rank's cache.
        batch: its number, as `Started` told it.
    """

    rank: int
    rids: tuple[str, ...]
    flops: float
    seconds: float
    cached: dict[str, int]
    batch: int = 0


class Started(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """``rank`` begins to compute its batch number ``batch``, which has a part of each of ``rids``."""

    rank: int
    batch: int
    rids: tuple[str, ...]


class Beat(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The process of ``rank`` lives, whatever it computes."""

    rank: int
    pid: int


class CacheEvents(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """``payload`` is one publication of SGLang's KV-cache events, as `asyncep_router.kv_events` decodes it."""

    rank: int
    payload: bytes


class Threshold(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """``rank`` has measured its T anew: FLOPs per layer and batch from which its gathers are hidden."""

    rank: int
    layer_flops: float


RankMessage = Finished | CacheEvents | Threshold | Started | Beat
_decoder = msgspec.msgpack.Decoder(RankMessage)


def encode(message: RankMessage) -> bytes:
    """One frame."""
    return msgspec.msgpack.encode(message)


def decode(frame: bytes) -> RankMessage:
    """The message of a frame. Raises `msgspec.DecodeError`."""
    message: RankMessage = decoded(_decoder, frame)
    return message
