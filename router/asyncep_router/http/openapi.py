"""The document of the router's endpoints, made from the table that it serves by. Pure."""

from __future__ import annotations

from typing import Any

from asyncep_router.http.access import Right
from asyncep_router.http.routes import ROUTES, Route

_ERROR = {"$ref": "#/components/schemas/Error"}


def document(keyed: bool) -> dict[str, Any]:
    """OpenAPI 3.1. `keyed`: the router has keys."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, keyed)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "asyncep_router",
            "version": "1",
            "description": "A router in front of SGLang servers. Bodies of inference are passed on to a server, which "
            "checks the fields that are not described here.",
        },
        "paths": paths,
        "components": {
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["type", "code", "message"],
                            "properties": {name: {"type": "string"} for name in ("type", "code", "message")},
                        }
                    },
                }
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, keyed: bool) -> dict[str, Any]:
    name = route.path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace(".", "_")
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{name}",
        "summary": route.summary,
        "description": {
            Right.OPEN: "Answers anybody.",
            Right.CLIENT: "Needs a key, if clients have any.",
            Right.ADMIN: "Needs the administrator's key; without any keys, a program on the router's machine.",
        }[route.right],
        "responses": _responses(route),
    }
    parameters = [
        {"name": entry, "in": "query", "required": True, "schema": {"type": "string"}} for entry in route.query
    ]
    if "{id}" in route.path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": {"type": "string"}})
    if parameters:
        operation["parameters"] = parameters
    if route.method in ("POST", "PUT") and not route.query and route.handler != "flush":
        operation["requestBody"] = {
            "required": bool(route.needs) or route.infers,
            "content": {"application/json": {"schema": _body(route)}},
        }
    if keyed and route.right is not Right.OPEN:
        operation["security"] = [{"key": []}]
    return operation


def _body(route: Route) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    if route.handler == "add":
        schema["properties"] = {
            "url": {"type": "string"},
            "api_key": {"type": ["string", "null"]},
            "labels": _LABELS,
        }
    elif route.handler == "change":
        schema["properties"] = {"api_key": {"type": ["string", "null"]}, "labels": _LABELS}
    if route.needs:
        schema["required"] = list(route.needs)
    return schema


_LABELS = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}


def _responses(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {"2XX": {"description": "The answer.", "content": {"application/json": {}}}}
    if route.infers:
        found["2XX"]["content"]["text/event-stream"] = {}
    found["4XX"] = {"description": "Refused, with the reason.", "content": {"application/json": {}}}
    found["5XX"] = {
        "description": "No worker could answer, with the reason.",
        "content": {"application/json": {}},
    }
    if not route.infers and route.handler != "ask_one":
        found["4XX"]["content"]["application/json"] = {"schema": _ERROR}
    return found
