"""Messages of a frame that anybody may have sent."""

from __future__ import annotations

from typing import TypeVar

import msgspec

_Message = TypeVar("_Message")


def decoded(decoder: msgspec.msgpack.Decoder[_Message], frame: bytes) -> _Message:
    """The message of a frame.

    Raises:
        msgspec.DecodeError: it is none. msgspec itself also raises UnicodeDecodeError for text that is none, and
            RecursionError for lists nested too deep.
    """
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
