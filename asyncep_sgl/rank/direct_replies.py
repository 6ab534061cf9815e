"""Replies with nothing to decode go from a rank straight to the tokenizer's process.

SGLang sends every reply through its detokenizer: one more process that unpickles, looks at and pickles the message and
competes with the ranks for their cores. For a request that asks for no new token it adds an empty text.
"""

from __future__ import annotations

from typing import Any

import zmq
from sglang.srt.managers.io_struct import BatchEmbeddingOutput, BatchStrOutput, BatchTokenIDOutput, sock_send
from sglang.srt.runtime_context import get_serving

_TEXTS = "output_strs"
_COPIED = tuple(field for field in BatchStrOutput.__struct_fields__ if field != _TEXTS)


def without_text(output: Any) -> Any | None:
    """What the detokenizer would make of a message, or None if it has something to decode.

    A request that has finished and put out no token, now or before, has no text. Tensors, which the detokenizer
    encodes, and beams are left to it.
    """
    if isinstance(output, BatchEmbeddingOutput):
        return output
    if not isinstance(output, BatchTokenIDOutput) or not output.rids:
        return None
    if any(output.completion_tokens) or any(output.decoded_texts) or None in output.finished_reasons:
        return None
    if output.routed_experts or output.indexer_topk or output.beam_search_output:
        return None
    copied = {field: getattr(output, field) for field in _COPIED}
    return BatchStrOutput(**copied, output_strs=[""] * len(output.rids))


class DirectSender:
    """In the place of SGLang's sender to the detokenizer, which it has for what is to be decoded."""

    def __init__(self, to_detokenizer: Any, to_tokenizer: zmq.Socket[bytes]) -> None:
        self._to_detokenizer = to_detokenizer
        self._to_tokenizer = to_tokenizer

    def send_output(self, output: Any, recv_obj: Any = None) -> None:
        """Sends one message on the shorter way that it can take."""
        direct = without_text(output)
        if direct is None:
            self._to_detokenizer.send_output(output, recv_obj)
        else:
            sock_send(self._to_tokenizer, direct)


def streamer_class(chosen: Any, to_tokenizer: zmq.Socket[bytes]) -> Any:
    """SGLang's class of output streamers, with a `DirectSender`; as it is where the tokenizer is not one process."""
    if get_serving().skip_tokenizer_init or get_serving().tokenizer_worker_num != 1:
        return chosen

    class DirectStreamer(chosen):  # type: ignore[misc] # upstream is untyped
        def __post_init__(self) -> None:
            super().__post_init__()
            sender: Any = self.send_to_detokenizer
            self.send_to_detokenizer: Any = DirectSender(sender, to_tokenizer)

    return DirectStreamer
