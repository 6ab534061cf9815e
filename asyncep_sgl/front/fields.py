"""Every field of a request that SGLang hands to its ranks, with what its value may be. Pure.

SGLang's own checks let through what a rank then ends on: a ``top_k`` wider than 32 bits, lists of the wrong length,
fields that are its own internal state. The tables here name each field of its request classes; `test_fields.py`
compares them with the installed SGLang, so that a field of a later version is noticed and decided on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asyncep_sgl.front.rules import (
    Refused,
    Rule,
    flag,
    keyed,
    list_of,
    not_unicode,
    number,
    one_or_list,
    shown,
    text,
    whole,
)

INT32, INT64 = 2**31 - 1, 2**63 - 1
# SGLang's value for "every token of the vocabulary"; the largest that its 32-bit tensors are given.
_ALL_TOKENS = 1 << 30
_MOST_IDS = 1024
_NAME = text(256)
_MEDIA = Refused("the models here read text; put the content into text or input_ids")
_ADAPTERS = text(4096)
_TWO_STAGE = Refused("prefill and decode run in one server")
_SESSIONS = Refused("every prompt is whole; prefixes are shared without sessions")
_TENSORS = Refused("prompts are text or token ids")
_SEEN_INSIDE = Refused("a rank answers with log-probabilities only")
_OURS = Refused("SGLang sets this field itself")
_CODE = Refused("a request cannot bring code")

# Reserved by SGLang for its own signs of life, which pass the router by.
_HEALTH_CHECK = "HEALTH_CHECK"


@dataclass(frozen=True)
class Bounds:
    """What the checks need to know of model and server.

    Attributes:
        vocabulary: token ids the model has.
        max_prompts: prompts of one request, samples counted.
        max_prompt_chars: characters of one prompt, or token ids: more than its context holds in any case.
        max_samples: samples of one prompt.
        max_values: log-probabilities in one answer.
        decodes: whether requests that decode are served.
    """

    vocabulary: int
    max_prompts: int
    max_prompt_chars: int
    max_samples: int
    max_values: int
    decodes: bool = False


def rid(value: Any) -> str | None:
    """A request's id."""
    wrong = _NAME(value)
    if wrong is None and not value.isprintable():
        wrong = f"{shown(value)}: printable characters are needed"
    if wrong is None and value.startswith(_HEALTH_CHECK):
        wrong = f"{shown(value)}: ids that begin with {_HEALTH_CHECK} are the server's own"
    return wrong


# Fields that a list of prompts may give as a list with one value for each prompt.
_EACH_PROMPT: Mapping[str, Rule] = {
    "rid": rid,
    "return_logprob": flag,
    "logprob_start_len": whole(-1, INT32),
    "extra_key": _NAME,
    "cache_salt": _NAME,
    "lora_path": _ADAPTERS,
}
# Those of them for which null stands for the default in such a list.
_ANY_NULL = frozenset({"lora_path"})

_SHARED: Mapping[str, Rule] = {
    "image_data": _MEDIA,
    "video_data": _MEDIA,
    "audio_data": _MEDIA,
    "modalities": _MEDIA,
    "lora_id": _OURS,
    "http_worker_ipc": _OURS,
    "input_embeds": _TENSORS,
    "positional_embed_overrides": _TENSORS,
    "log_metrics": flag,
    "background": flag,
    "routing_key": _NAME,
    "return_prompt_token_ids": flag,
    "external_trace_header": keyed(str.isprintable, text(4096), 64, "a printable name"),
    "received_time": number(0, 1e15),
    "multi_item_delimiter_indices": Refused("prompts of several items are not scored in one pass"),
    "token_indices_to_pool": Refused("logits are read after the last token"),
}

GENERATE: Mapping[str, Rule] = {
    **_SHARED,
    "session_id": _NAME,
    "session_params": _SESSIONS,
    "mm_hashes": _MEDIA,
    "mm_content_hashes": _MEDIA,
    "use_audio_in_video": _MEDIA,
    "video_config": _MEDIA,
    "images_config": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "max_dynamic_patch": _MEDIA,
    "min_dynamic_patch": _MEDIA,
    "image_max_dynamic_patch": _MEDIA,
    "video_max_dynamic_patch": _MEDIA,
    "need_wait_for_mm_inputs": _MEDIA,
    "num_items_assigned": _MEDIA,
    "encoder_urls": _MEDIA,
    "watermark": Refused("nothing is written that could carry one"),
    "return_sampling_mask": Refused("tokens are not sampled here"),
    "sampling_logprobs_mode": Refused("tokens are not sampled here"),
    "return_text_in_logprobs": flag,
    "return_flat_raw_top_logprobs": flag,
    "return_flat_raw_output_top_logprobs": flag,
    "return_flat_raw_top_logprobs_b64": flag,
    "stream": flag,
    "return_hidden_states": _SEEN_INSIDE,
    "return_routed_experts": _SEEN_INSIDE,
    "routed_experts_start_len": Refused("a rank answers with log-probabilities only", unless=(0,)),
    "return_indexer_topk": _SEEN_INSIDE,
    "return_entropy": _SEEN_INSIDE,
    "return_bytes": _OURS,
    "custom_logit_processor": _CODE,
    "bootstrap_host": _TWO_STAGE,
    "bootstrap_port": _TWO_STAGE,
    "bootstrap_room": _TWO_STAGE,
    "bootstrap_pair_key": _TWO_STAGE,
    "decode_tp_size": _TWO_STAGE,
    "disagg_prefill_dp_rank": _TWO_STAGE,
    "routed_dp_rank": whole(0, INT32),
    "data_parallel_rank": whole(0, INT32),
    "conversation_id": _NAME,
    "require_reasoning": flag,
    "max_thinking_tokens": whole(0, INT32),
    "priority": whole(-1000, 1000),
    "no_logs": flag,
    "custom_labels": Refused("every label would be a metric series of its own"),
    "kv_hints": Refused("the router inside decides where a prompt goes"),
}

EMBEDDING: Mapping[str, Rule] = {
    **_SHARED,
    "embed_override_token_id": _TENSORS,
    "embed_overrides": _TENSORS,
    "is_cross_encoder_request": flag,
    "priority": whole(-1000, 1000),
    "dimensions": whole(1, INT32),
    "return_pooled_hidden_states": flag,
    "decision_layout": Refused("decision heads are not served"),
}

# Checked by code of their own, below.
PROMPTS = frozenset({"text", "input_ids"})
BY_VOCABULARY = frozenset({"top_logprobs_num", "token_ids_logprob", "sampling_params"})
PER_PROMPT = frozenset(_EACH_PROMPT)

_GRAMMAR = "a grammar constrains decoding, and nothing is decoded; read log-probabilities (token_ids_logprob) instead"
_STATE = Refused("SGLang's own state, not a parameter", unless=(0, False))
_SCALAR = one_or_list(lambda v: None if isinstance(v, bool | int | float | str) else "a scalar is needed", 64)


def sampling(bounds: Bounds) -> Mapping[str, Rule]:
    """The rules of SGLang's sampling parameters."""
    grammar = text(1 << 16) if bounds.decodes else Refused(_GRAMMAR)
    token = whole(0, bounds.vocabulary - 1)

    def is_token(name: str) -> bool:
        return name.isascii() and name.isdecimal() and len(name) < 12 and int(name) < bounds.vocabulary

    return {
        "max_new_tokens": whole(0, INT32),
        "stop": one_or_list(text(1024), 32),
        "stop_token_ids": list_of(token, _MOST_IDS),
        "stop_regex": one_or_list(text(256), 32) if bounds.decodes else Refused("nothing is decoded that could stop"),
        "temperature": number(0, 1000),
        "top_p": number(0, 1, above=True),
        "top_k": whole(-1, _ALL_TOKENS),
        "min_p": number(0, 1),
        "frequency_penalty": number(-2, 2),
        "presence_penalty": number(-2, 2),
        "repetition_penalty": number(0, 2, above=True),
        "min_new_tokens": whole(0, INT32),
        "n": whole(1, bounds.max_samples),
        "beam_width": whole(1, 1) if not bounds.decodes else whole(1, bounds.max_samples),
        "json_schema": grammar,
        "regex": grammar,
        "ebnf": grammar,
        "structural_tag": grammar,
        "ignore_eos": flag,
        "skip_special_tokens": flag,
        "spaces_between_special_tokens": flag,
        "no_stop_trim": flag,
        "stream_interval": whole(1, INT32),
        "logit_bias": keyed(is_token, number(-100, 100), _MOST_IDS, "a token id of the vocabulary"),
        "sampling_seed": whole(-INT64 - 1, INT64),
        "custom_params": keyed(str.isprintable, _SCALAR, 64, "a printable name"),
        "watermark": Refused("nothing is written that could carry one"),
        "stop_strs": _STATE,
        "stop_regex_strs": _STATE,
        "stop_str_max_len": _STATE,
        "stop_regex_max_len": _STATE,
        "is_normalized": _STATE,
        "ebnf_full_assistant": flag if bounds.decodes else _STATE,
    }


def check_request(request: Any, bounds: Bounds) -> int:
    """Checks every field of a request before any work is done for it.

    A field that is not served and asks for nothing, such as an empty list, is set to its default.

    Args:
        request: has the fields of SGLang's ``GenerateReqInput`` or ``EmbeddingReqInput`` as attributes.
        bounds: of this server.

    Returns:
        Prompts that the ranks will compute for it, samples counted.

    Raises:
        ValueError: names the field, what is wrong with it and what is taken.
    """
    prompts = _check_prompts(request, bounds)
    table = GENERATE if hasattr(request, "return_logprob") else EMBEDDING
    for name, rule in table.items():
        value = getattr(request, name, None)
        _refuse(name, value, rule)
        if isinstance(rule, Refused) and value is not None:
            setattr(request, name, _default(request, name))
    for name, rule in _EACH_PROMPT.items():
        _check_each(name, getattr(request, name, None), rule, prompts, null=name in _ANY_NULL)
    top = whole(0, bounds.vocabulary)
    _check_each("top_logprobs_num", getattr(request, "top_logprobs_num", None), top, prompts)
    _check_ids(getattr(request, "token_ids_logprob", None), prompts, bounds)
    samples = _check_sampling(request.sampling_params, prompts, bounds)
    total = (prompts or 1) * samples
    if total > bounds.max_prompts:
        raise ValueError(
            f"text: {total} prompts in one request (samples counted), {bounds.max_prompts} are taken "
            "(--asyncep-max-prompts); send several requests"
        )
    _check_values(getattr(request, "token_ids_logprob", None), prompts or 1, samples, bounds)
    return total


def _check_values(ids: list[Any] | None, prompts: int, samples: int, bounds: Bounds) -> None:
    """SGLang copies the ids for each prompt and sample, before anybody counts what the answer will have."""
    if not ids:
        return
    each = isinstance(ids[0], list)
    values = samples * (sum(len(entry) for entry in ids if isinstance(entry, list)) if each else prompts * len(ids))
    if values > bounds.max_values:
        raise ValueError(
            f"token_ids_logprob: {values} log-probabilities for {prompts} prompts of {samples} samples, "
            f"{bounds.max_values} are taken (--asyncep-max-logprobs); ask for fewer ids, or send several requests"
        )


def _default(request: Any, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(request) if field.name == name)


def _check_prompts(request: Any, bounds: Bounds) -> int | None:
    """How many prompts a list has; None for a single prompt."""
    given = [name for name in ("text", "input_ids") if getattr(request, name, None) is not None]
    if len(given) != 1:
        raise ValueError("text, input_ids: give one of the two")
    name, value = given[0], getattr(request, given[0])
    if isinstance(value, str) and name == "text":
        _check_text(name, value, bounds)
        return None
    if not isinstance(value, list):
        raise ValueError(f"{name}: {shown(value)}: a {'string' if name == 'text' else 'list of token ids'} is needed")
    if not value:
        raise ValueError(f"{name}: the list is empty; give at least one prompt")
    if name == "input_ids" and not isinstance(value[0], list):
        _check_count(name, value, bounds)
        return None  # one prompt; the ids themselves are checked when its length is known to fit
    if len(value) > bounds.max_prompts:
        raise ValueError(
            f"{name}: {len(value)} prompts in one request, {bounds.max_prompts} are taken (--asyncep-max-prompts); "
            "send several requests"
        )
    pairs = getattr(request, "is_cross_encoder_request", False) is True
    for place, prompt in enumerate(value):
        if name == "input_ids":
            if not isinstance(prompt, list):
                raise ValueError(f"input_ids[{place}]: {shown(prompt)}: a list of token ids is needed")
            _check_count(f"input_ids[{place}]", prompt, bounds)
        elif pairs and isinstance(prompt, list | tuple) and len(prompt) == 2:
            for part in prompt:
                _check_text(f"text[{place}]", part, bounds)
        else:
            _check_text(f"text[{place}]", prompt, bounds)
    return len(value)


def _check_count(name: str, ids: list[Any], bounds: Bounds) -> None:
    if len(ids) > bounds.max_prompt_chars:
        raise ValueError(f"{name}: {len(ids)} token ids; the model's context holds far fewer")


def _check_text(name: str, value: Any, bounds: Bounds) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name}: {shown(value)}: a string is needed")
    if len(value) > bounds.max_prompt_chars:
        raise ValueError(
            f"{name}: {len(value)} characters, {bounds.max_prompt_chars} are taken in one prompt "
            "(--asyncep-max-prompt-chars); the model's context holds no more"
        )
    if (wrong := not_unicode(value)) is not None:
        raise ValueError(f"{name}: {wrong}")


def _refuse(name: str, value: Any, rule: Rule) -> None:
    if value is not None and (wrong := rule(value)) is not None:
        raise ValueError(f"{name}: {wrong}")


def _check_each(name: str, value: Any, rule: Rule, prompts: int | None, *, null: bool = False) -> None:
    """A value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        _refuse(name, value, rule)
        return
    _check_length(name, value, prompts)
    for place, entry in enumerate(value):
        if entry is None and not null:
            raise ValueError(f"{name}[{place}]: null; give a value for each prompt, or leave the field out")
        _refuse(f"{name}[{place}]", entry, rule)


def _check_length(name: str, value: list[Any], prompts: int | None) -> None:
    if prompts is None:
        raise ValueError(f"{name}: a list for a single prompt; give one value")
    if len(value) != prompts:
        raise ValueError(f"{name}: {len(value)} values for {prompts} prompts; give one for each, or one for all")


def _check_ids(value: Any, prompts: int | None, bounds: Bounds) -> None:
    """``token_ids_logprob``: ids for all prompts, or a list with ids for each."""
    if value is None:
        return
    if not isinstance(value, list):
        raise ValueError(f"token_ids_logprob: {shown(value)}: a list of token ids is needed")
    ids = list_of(whole(0, bounds.vocabulary - 1), bounds.vocabulary)
    if not any(entry is None or isinstance(entry, list) for entry in value):
        if not _are_ids(value, bounds):
            _refuse("token_ids_logprob", value, ids)
        return
    _check_length("token_ids_logprob", value, prompts)
    if not isinstance(value[0], list):
        raise ValueError("token_ids_logprob[0]: a list of token ids is needed, as for the other prompts")
    before: Any = None
    for place, entry in enumerate(value):
        # The same list again and again is what SGLang makes of labels that hold for all texts.
        if entry is not before and not (isinstance(entry, list) and _are_ids(entry, bounds)):
            _refuse(f"token_ids_logprob[{place}]", entry, ids)
        before = entry


def _are_ids(value: list[Any], bounds: Bounds) -> bool:
    """Whether all are token ids and not too many, without a step in Python for each."""
    return (
        0 < len(value) <= bounds.vocabulary
        and set(map(type, value)) == {int}
        and min(value) >= 0
        and max(value) < bounds.vocabulary
    )


def _check_sampling(value: Any, prompts: int | None, bounds: Bounds) -> int:
    """``sampling_params``: an object for all prompts, or a list with one for each. Answers their samples."""
    entries = [value if value is not None else {}]
    names = ["sampling_params"]
    if isinstance(value, list):
        _check_length("sampling_params", value, prompts)
        entries, names = value, [f"sampling_params[{place}]" for place in range(len(value))]
    rules = sampling(bounds)
    # A list often repeats one object: what has been found good is not looked at again.
    good: list[dict[str, Any]] = []
    for name, entry in zip(names, entries, strict=True):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}: {shown(entry)}: an object is needed")
        if any(entry is one for one in good[-1:]):
            continue
        for key, setting in list(entry.items()):
            if key not in rules:
                raise ValueError(f"{name}.{shown(key)}: no sampling parameter of that name is known")
            _refuse(f"{name}.{key}", setting, rules[key])
            if isinstance(rules[key], Refused):
                del entry[key]
        good.append(entry)
    samples = {entry.get("n") or 1 for entry in good}
    if len(samples) > 1:
        raise ValueError("sampling_params: n must be the same for all prompts of a request")
    return samples.pop()


def answer_values(request: Any, tokens: int) -> int:
    """Log-probabilities in the answer for one prompt.

    Args:
        request: has the fields of one prompt of SGLang's ``GenerateReqInput``.
        tokens: of the prompt.
    """
    if not getattr(request, "return_logprob", False):
        return 0
    start = request.logprob_start_len
    positions = 1 if start is None or start < 0 else max(1, tokens - start) + 1
    return positions * (1 + (request.top_logprobs_num or 0) + len(request.token_ids_logprob or ()))
