"""Every endpoint of the router, in one table: who may call it, what it takes. Served and documented from here. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from asyncep_router.http.access import Right


class Route(NamedTuple):
    """An endpoint.

    Attributes:
        method: of HTTP.
        path: `{id}` stands for one part of it.
        right: what it asks of its caller.
        handler: name of the method of `Admin` that answers; empty for inference, which `App` plans and relays.
        summary: one sentence.
        needs: fields that a body must have.
        query: parameters of the query that must be there.
    """

    method: str
    path: str
    right: Right
    handler: str
    summary: str
    needs: tuple[str, ...] = ()
    query: tuple[str, ...] = ()

    @property
    def infers(self) -> bool:
        """Whether prompts are computed."""
        return not self.handler


INFERENCE = (
    ("/generate", "Prompts in SGLang's own form; a list of them is spread over the ranks."),
    ("/v1/completions", "Completions as OpenAI's API has them."),
    ("/v1/chat/completions", "Chat completions as OpenAI's API has them."),
    ("/v1/score", "Scores of labels for each of several items."),
    ("/v1/embeddings", "Embeddings as OpenAI's API has them."),
    ("/v1/classify", "Classes of texts, by a classification model."),
    ("/classify", "Classes of texts, by a classification model, in SGLang's own form."),
    ("/encode", "Embeddings in SGLang's own form."),
    ("/v1/rerank", "Documents ordered by their relevance to a query."),
    ("/v1/decisions", "Decisions of a decision model."),
)

_PASSED_ON = (
    ("GET", "/v1/models", "The model, as OpenAI's API names it."),
    ("GET", "/model_info", "What a worker says of its model."),
    ("GET", "/get_model_info", "The same as /model_info."),
    ("GET", "/server_info", "What a worker says of itself, without keys and paths."),
    ("GET", "/get_server_info", "The same as /server_info."),
    ("POST", "/tokenize", "Token ids of texts."),
    ("POST", "/v1/tokenize", "Token ids of texts."),
    ("POST", "/detokenize", "Texts of token ids."),
    ("POST", "/v1/detokenize", "Texts of token ids."),
)

_OPEN, _CLIENT, _ADMIN = Right.OPEN, Right.CLIENT, Right.ADMIN

ROUTES: tuple[Route, ...] = (
    Route("GET", "/liveness", _OPEN, "alive", "The router runs."),
    Route("GET", "/health", _OPEN, "ready", "At least one worker takes requests."),
    Route("GET", "/readiness", _OPEN, "ready", "At least one worker takes requests."),
    Route("GET", "/openapi.json", _OPEN, "document", "This document."),
    Route("GET", "/health_generate", _CLIENT, "health_generate", "Every worker computes a token."),
    *(Route(method, path, _CLIENT, "", text) for path, text in INFERENCE for method in ("POST", "PUT")),
    *(Route(method, path, _CLIENT, "ask_one", text) for method, path, text in _PASSED_ON),
    Route("GET", "/router/state", _CLIENT, "state", "Workers, ranks and requests as the router sees them."),
    Route("GET", "/get_loads", _CLIENT, "loads", "Requests at each worker and waiting here."),
    Route("GET", "/v1/loads", _CLIENT, "loads", "Requests at each worker and waiting here."),
    Route("GET", "/workers", _CLIENT, "list", "The workers."),
    Route("GET", "/workers/{id}", _CLIENT, "show", "One worker, by its id."),
    Route("GET", "/list_workers", _CLIENT, "legacy_list", "The workers' URLs."),
    Route("POST", "/workers", _ADMIN, "add", "Add a worker.", needs=("url",)),
    Route("PUT", "/workers/{id}", _ADMIN, "change", "Change a worker's labels or key."),
    Route("DELETE", "/workers/{id}", _ADMIN, "remove", "Remove a worker once its requests are answered."),
    Route("POST", "/add_worker", _ADMIN, "legacy_add", "Add a worker.", query=("url",)),
    Route("POST", "/remove_worker", _ADMIN, "legacy_remove", "Remove a worker.", query=("url",)),
    Route("POST", "/flush_cache", _ADMIN, "flush", "Empty the caches of all workers."),
    Route("POST", "/abort_request", _ADMIN, "abort", "End requests at all workers."),
)

_FIXED = {(route.method, route.path): route for route in ROUTES if "{" not in route.path}
_PATTERNS = [
    (re.compile(re.escape(route.path).replace(r"\{id\}", ".+")), route) for route in ROUTES if "{" in route.path
]


def find(method: str, path: str) -> Route | tuple[str, ...]:
    """The route; otherwise the methods that the path has, none if there is no such endpoint."""
    route = _FIXED.get((method, path))
    if route is not None:
        return route
    allowed = {other for other, known in _FIXED if known == path}
    for pattern, route in _PATTERNS:
        if pattern.fullmatch(path):
            if route.method == method:
                return route
            allowed.add(route.method)
    return tuple(sorted(allowed))
