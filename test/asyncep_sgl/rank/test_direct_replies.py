"""What a rank sends past the detokenizer is what the detokenizer would have sent."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import pytest
import tiny_models
from sglang.srt.managers.detokenizer_manager import DetokenizerManager, LimitedCapacityDict
from sglang.srt.managers.io_struct import BatchStrOutput, BatchTokenIDOutput

from asyncep_sgl.rank.direct_replies import DirectSender, without_text

LENGTH = {"type": "length", "length": 0}


def output(new_tokens: list[list[int]], **changes: Any) -> BatchTokenIDOutput:
    """A rank's message about requests with these new tokens; prompts are tokens 40, 41, … of growing length."""
    count = len(new_tokens)
    prompts = [list(range(40, 45 + number)) for number in range(count)]
    values = [[-1.5 - number] for number in range(count)]
    ids = [[number] for number in range(count)]
    known: dict[str, Any] = {
        "rids": [f"r{number}" for number in range(count)],
        "finished_reasons": [dict(LENGTH) for _ in range(count)],
        "decoded_texts": [""] * count,
        "decode_ids": [array("q", prompt + new) for prompt, new in zip(prompts, new_tokens, strict=True)],
        "read_offsets": [len(prompt) for prompt in prompts],
        "output_ids": [array("q", new) for new in new_tokens],
        "skip_special_tokens": [True] * count,
        "spaces_between_special_tokens": [True] * count,
        "no_stop_trim": [False] * count,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "completion_tokens": [len(new) for new in new_tokens],
        "reasoning_tokens": [0] * count,
        "cached_tokens": list(range(count)),
        "output_token_ids_logprobs_val": values,
        "output_token_ids_logprobs_idx": ids,
        "retraction_counts": [0] * count,
        "dp_ranks": [1] * count,
    }
    known.update(changes)
    # What this test does not name, and has no default upstream, was not asked for.
    absent = {field: None for field in BatchTokenIDOutput.__struct_fields__ if _required(field) and field not in known}
    return BatchTokenIDOutput(**known, **absent)


def _required(field: str) -> bool:
    found = next(each for each in msgspec.structs.fields(BatchTokenIDOutput) if each.name == field)
    return bool(found.required)


@pytest.fixture(scope="module")
def detokenizer() -> Any:
    """SGLang's, without its sockets."""
    manager = object.__new__(DetokenizerManager)
    manager.tokenizer = tiny_models.tokenizer()
    manager.vocab_size = tiny_models.VOCABULARY
    manager.decode_status = LimitedCapacityDict(capacity=100)
    manager.disable_tokenizer_batch_decode = False
    manager.is_tool_call_parser_gpt_oss = False
    manager.tool_close_token_ids = set()
    return manager


@pytest.mark.parametrize("reason", [LENGTH, {"type": "stop", "matched": 0}, {"type": "abort", "message": "m"}])
def test_the_same_message(detokenizer: Any, reason: dict[str, Any]) -> None:
    message = output([[], [], []], finished_reasons=[dict(reason) for _ in range(3)])
    direct = without_text(message)
    assert isinstance(direct, BatchStrOutput)
    assert direct == detokenizer.handle_batch_token_id_out(message)
    assert direct.output_strs == [""] * 3


@pytest.mark.parametrize(
    "message",
    [
        output([[], [7]]),
        output([[], []], finished_reasons=[dict(LENGTH), None]),
        output([[], []], decoded_texts=["", "so far"]),
        output([]),
        "something else",
    ],
    ids=["a token to decode", "not finished", "text before", "nobody", "another message"],
)
def test_the_rest_is_the_detokenizers(message: Any) -> None:
    assert without_text(message) is None
    sent: list[Any] = []

    class Detokenizer:
        def send_output(self, output: Any, recv_obj: Any = None) -> None:
            sent.append((output, recv_obj))

    DirectSender(Detokenizer(), None).send_output(message, "whose")  # type: ignore[arg-type] # no socket is used
    assert sent == [(message, "whose")]
