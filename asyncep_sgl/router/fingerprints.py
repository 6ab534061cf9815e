"""What makes two requests the same to a rank."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import msgpack_encode

# Who asks, when, how urgently and in which words before tokenization: no rank computes anything else for it.
_OF_THE_SENDER = {
    "rid": None,
    "http_worker_ipc": None,
    "time_stats": None,
    "priority": None,
    "routed_dp_rank": None,
    "routing_key": None,
    "input_text": None,
}


def fingerprint(req: Any) -> bytes:
    """Of SGLang's tokenized request: equal for requests with the same token ids and the same settings."""
    fields = {name: value for name, value in _OF_THE_SENDER.items() if name in req.__struct_fields__}
    return hashlib.blake2b(msgpack_encode(msgspec.structs.replace(req, **fields)), digest_size=16).digest()
