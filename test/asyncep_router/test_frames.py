"""Bytes from anybody are a message or a DecodeError, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asyncep_router.kv_events import decode_batch
from asyncep_sgl.experts.group.peers import decode as decode_of_hosts
from asyncep_sgl.router.wire import decode as decode_of_ranks


@pytest.mark.parametrize("decode", [decode_batch, decode_of_hosts, decode_of_ranks])
@given(frame=st.binary(max_size=60))
@example(frame=b"\x92\xa8Finished\xc7")
@example(frame=b"\xa1\xc7")
@example(frame=b"\x92\xa1\xff\xc0")
@example(frame=b"\x91" * 100_000)
def test_any_bytes(decode: Callable[[bytes], Any], frame: bytes) -> None:
    try:
        decode(frame)
    except msgspec.DecodeError:
        return
