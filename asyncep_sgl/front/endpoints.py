"""Who may call which endpoint: the allow-list of a server. Pure.

SGLang offers far more than serving: it can be paused, profiled, emptied and rewritten over HTTP. An endpoint that does
not stand here is not there for clients, so that one which a later SGLang adds is closed until somebody has decided.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Access(Enum):
    """Who an endpoint answers."""

    OPEN = "anybody"
    CLIENT = "clients"
    OPERATOR = "the operator"
    ADMIN = "the administrator"
    DECODING = "clients, where --asyncep-decode allow is set"
    NEVER = "nobody"


@dataclass(frozen=True)
class Rule:
    """Who may call, and for `Access.NEVER` why nobody may."""

    access: Access
    reason: str = ""


INFERENCE = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/score",
    "/v1/classify",
    "/classify",
    "/v1/rerank",
    "/v1/embeddings",
    "/encode",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/invocations",
    "/vertex_generate",
)
"""Endpoints that read a prompt: what goes wrong before a rank has it is the request's fault."""
QUESTIONS = (
    "/v1/models",
    "/model_info",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/v1/loads",
)
"""Questions to the server: what goes wrong with parameters in the URL is the request's fault."""
_CLIENT = (
    *QUESTIONS,
    "/v1/models/{}",
    "/v1/files",
    "/v1/files/{}",
    "/v1/files/{}/content",
    "/v1/batches",
    "/v1/batches/{}",
    "/v1/batches/{}/cancel",
    "/asyncep/status",
    "/router/state",
    "/openapi.json",
    "/docs",
    "/docs/oauth2-redirect",
    "/redoc",
    # Whose requests it may end is decided where it is answered.
    "/abort_request",
)
_OPEN = ("/health", "/health_generate", "/ready", "/ping", "/metrics")
# What users of SGLang do daily, from the machine itself, before they have thought of keys.
_OPERATOR = ("/flush_cache",)
_ADMIN = (
    # They try patterns on a text, some of which take exponentially long on one that was made for it.
    "/parse_function_call",
    "/separate_reasoning",
    "/configure_logging",
    "/set_trace_level",
    "/freeze_gc",
    "/pause_generation",
    "/continue_generation",
    "/set_internal_state",
)

# Of protocols for conversations.
DECODING = (
    "/v1/responses",
    "/v1/responses/{}",
    "/v1/responses/{}/cancel",
    "/api/chat",
    "/api/generate",
    "/api/tags",
    "/api/show",
)

_WEIGHTS = "the experts are shared by all ranks and read-only; restart asyncep serve to change weights"
_MEMORY = "the experts' memory is shared by all ranks; restart asyncep serve to give it back"
_ADAPTERS = "adapters are not served"
_STAGES = "prefill and decode run in one server"
_PROFILES = "SGLang's profiler ends ranks on a CPU; use an external profiler such as py-spy or perf"
_SESSIONS = "every prompt is whole; prefixes are shared without sessions"
_CORPUS = "nothing is drafted from texts of others"
_RECORDER = "SGLang's recorder does not see the experts that our kernels compute"
_MEDIA = "the models here read text"
_NEVER = {
    "/update_weights_from_disk": _WEIGHTS,
    "/update_weights_from_tensor": _WEIGHTS,
    "/update_weights_from_distributed": _WEIGHTS,
    "/update_weights_from_ipc": _WEIGHTS,
    "/update_weight_version": _WEIGHTS,
    "/init_weights_update_group": _WEIGHTS,
    "/destroy_weights_update_group": _WEIGHTS,
    "/init_weights_send_group_for_remote_instance": _WEIGHTS,
    "/send_weights_to_remote_instance": _WEIGHTS,
    "/get_remote_instance_transfer_engine_info": _WEIGHTS,
    "/remote_instance_transfer_engine_info": _WEIGHTS,
    "/begin_weight_update": _WEIGHTS,
    "/end_weight_update": _WEIGHTS,
    "/get_weights_by_name": _WEIGHTS,
    "/weights_checker": _WEIGHTS,
    "/release_memory_occupation": _MEMORY,
    "/resume_memory_occupation": _MEMORY,
    "/load_lora_adapter": _ADAPTERS,
    "/load_lora_adapter_from_tensors": _ADAPTERS,
    "/unload_lora_adapter": _ADAPTERS,
    "/pd_role_switch": _STAGES,
    "/start_profile": _PROFILES,
    "/stop_profile": _PROFILES,
    "/open_session": _SESSIONS,
    "/close_session": _SESSIONS,
    "/start_expert_distribution_record": _RECORDER,
    "/stop_expert_distribution_record": _RECORDER,
    "/dump_expert_distribution_record": _RECORDER,
    "/slow_down": "it would slow every client down",
    "/add_external_corpus": _CORPUS,
    "/remove_external_corpus": _CORPUS,
    "/list_external_corpora": _CORPUS,
    "/hicache/storage-backend": "prefixes are kept in each rank's memory only",
    "/hicache/storage-backend/clear": "prefixes are kept in each rank's memory only",
    "/get_hicache_l3_cache_layout": "prefixes are kept in each rank's memory only",
    "/dumper/{}": "tensors are not dumped over HTTP",
    "/v1/decisions": "decision heads are not served",
    "/v1/systemone": "decision heads are not served",
    "/v1/audio/transcriptions": _MEDIA,
    "/v1/realtime": _MEDIA,
    "/scale_elastic_ep": "the number of ranks is that of the start",
    "/is_scaling_elastic_ep": "the number of ranks is that of the start",
    "/": "there is no page here",
}

ENDPOINTS: dict[str, Rule] = {
    **{path: Rule(Access.OPEN) for path in _OPEN},
    **{path: Rule(Access.CLIENT) for path in (*INFERENCE, *_CLIENT)},
    **{path: Rule(Access.OPERATOR) for path in _OPERATOR},
    **{path: Rule(Access.ADMIN) for path in _ADMIN},
    **{path: Rule(Access.DECODING) for path in DECODING},
    **{path: Rule(Access.NEVER, reason) for path, reason in _NEVER.items()},
}
"""By path; ``{}`` stands for one part of it."""

_PATTERNS = [
    (re.compile(re.escape(path).replace(r"\{\}", "[^/]+" if path != "/v1/models/{}" else ".+")), rule)
    for path, rule in ENDPOINTS.items()
    if "{}" in path
]


def rule_of(path: str) -> Rule | None:
    """The rule of a request's path; None where there is no such endpoint."""
    # SGLang's router redirects a path with a slash behind it to the one without: both are the same endpoint.
    path = path.rstrip("/") or "/"
    if (rule := ENDPOINTS.get(path)) is not None:
        return rule
    return next((rule for pattern, rule in _PATTERNS if pattern.fullmatch(path)), None)


def shown_in_schema(route: str, *, decodes: bool) -> bool:
    """Whether ``/openapi.json`` lists a route: if some caller may use it."""
    rule = ENDPOINTS.get(endpoint_of(route))
    return rule is not None and rule.access is not Access.NEVER and (decodes or rule.access is not Access.DECODING)


def endpoint_of(route: str) -> str:
    """A route of the web framework, such as ``/v1/files/{id}``, as a key of `ENDPOINTS`."""
    return re.sub(r"\{[^}]*\}", "{}", route)
