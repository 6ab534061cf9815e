"""What a rank and another host's worker say to each other. No transport in here.

A call is three frames: `Call`; the hidden states of its tokens, ``(tokens, H)``; and for each row the token it is of,
int32. A row is one assignment of a token to an expert. Rows stand in the order of experts, tokens ascending in each.
The answer comes in parts, as runs of experts are done: `Answer`, and the products of its rows, ``(rows, H)``.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np

from asyncep_router.frames import decoded


class Call(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """The rows of some experts of one layer.

    Attributes:
        number: of the caller's own count, which only grows.
        oldest: nobody waits any more for this caller's calls below it.
        layer: the decoder layer.
        first: the lowest expert.
        counts: rows of each expert from it on; 0 for one between that is not asked for.
        tokens: distinct tokens that the rows are of.
        digest: of both frames that follow, see `asyncep_sgl.experts.calls.frames`; 0 where nobody checks.
    """

    number: int
    oldest: int
    layer: int
    first: int
    counts: tuple[int, ...]
    tokens: int
    digest: int = 0


class Answer(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Products of some rows of a call.

    Attributes:
        number: of the call.
        row: the first of them, within the call.
        rows: how many.
        digest: of the frame that follows; 0 where nobody checks.
        busy: share of the host's cores, 0 to 1, that others than the worker have used of late.
    """

    number: int
    row: int
    rows: int
    digest: int = 0
    busy: float = 0.0


class Declined(msgspec.Struct, tag=True, frozen=True):
    """Nothing comes of call ``number``; ``reason`` is for the caller's log."""

    number: int
    reason: str


ToWorker = Call
ToCaller = Answer | Declined

_of_callers = msgspec.msgpack.Decoder(ToWorker)
_of_workers = msgspec.msgpack.Decoder(ToCaller)


class Shape(NamedTuple):
    """What a worker computes with: experts of a layer, elements of a hidden state, bytes of an element."""

    experts: int
    hidden: int
    item_bytes: int


def encode(message: ToWorker | ToCaller) -> bytes:
    """One frame."""
    return msgspec.msgpack.encode(message)


def decode_call(frame: bytes) -> Call:
    """Raises `msgspec.MsgspecError`."""
    call: Call = decoded(_of_callers, frame)
    return call


def decode_answer(frame: bytes) -> ToCaller:
    """Raises `msgspec.MsgspecError`."""
    answer: ToCaller = decoded(_of_workers, frame)
    return answer


def fault(call: Call, shape: Shape, held: frozenset[int], hidden: int, order: np.ndarray) -> str | None:
    """Why a call cannot be computed; None if it can. All of ``order`` is looked at: the kernel reads where it points.

    Args:
        held: experts of the layer that this host has.
        hidden: bytes of the hidden states that came.
        order: ``(rows,)`` int32, the token of each row.
    """
    last = call.first + len(call.counts)
    if not (0 <= call.first < last <= shape.experts):
        return f"experts {call.first} to {last - 1} of {shape.experts}"
    if min(call.counts) < 0 or sum(call.counts) != len(order):
        return f"{sum(call.counts)} rows are announced and {len(order)} came"
    if not all(expert in held for expert, count in enumerate(call.counts, start=call.first) if count):
        return f"experts {call.first} to {last - 1} are not all on this host"
    if call.tokens < 0 or hidden != call.tokens * shape.hidden * shape.item_bytes:
        return f"{hidden} bytes are not {call.tokens} hidden states of {shape.hidden} elements"
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < call.tokens):
        return f"a row is of a token beyond the {call.tokens} that came"
    return None
