"""Which routes there are and which fields each takes, read from SGLang's own request models.

The OpenAPI document and the schema of the sampling parameters (which the document has as "any object") are made in a
process of their own, once for each version of SGLang: importing its server takes 10 s and 1 GB that a client should not
have. A field that a later SGLang adds is there without a change here.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Fields that stand inside an object of which the document says nothing, and the schema they have there.
_INSIDE = {"sampling_params": "SamplingParams", "session_params": "SessionParams", "parameters": "SamplingParams"}
_PRINT = """
import dataclasses, json, sys, warnings
warnings.simplefilter("ignore")
import msgspec
from pydantic import TypeAdapter
from sglang.srt.entrypoints.http_server import app
from sglang.srt.managers.io_struct import SessionParams
from sglang.srt.sampling.sampling_params import SamplingParams

document = app.openapi()
schemas = document["components"]["schemas"]
for kind in (SamplingParams, SessionParams):
    if dataclasses.is_dataclass(kind):
        schemas[kind.__name__] = TypeAdapter(kind).json_schema()
        continue
    # Field by field: a struct that travels as an array has no names in its own schema.
    fields = msgspec.structs.fields(kind)
    found, more = msgspec.json.schema_components(
        [field.type for field in fields], schema_hook=lambda _: {}, ref_template="#/components/schemas/{name}"
    )
    schemas.update(more)
    schemas[kind.__name__] = {"properties": dict(zip((field.encode_name for field in fields), found))}
json.dump(document, sys.stdout)
"""


@dataclass(frozen=True)
class Field:
    """A place in a body: its keys from the outside in, and the JSON schema of what belongs there (no references)."""

    path: tuple[str, ...]
    schema: Mapping[str, Any]

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Route:
    """An operation of the server, with the fields of its body and those that a body must have."""

    method: str
    path: str
    fields: tuple[Field, ...]
    required: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


def sglang_document() -> dict[str, Any]:
    """The OpenAPI document of SGLang's HTTP server, with the schemas of what it keeps in open objects.

    Raises:
        RuntimeError: SGLang's server cannot be imported; with the reason.
    """
    folder = Path(os.environ.get("ASYNCEP_CACHE") or Path.home() / ".cache" / "asyncep") / "bench-models"
    mark = hashlib.sha256(_PRINT.encode()).hexdigest()[:12]
    kept = folder / f"openapi-{version('sglang')}-{mark}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    done = subprocess.run([sys.executable, "-c", _PRINT], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"no OpenAPI document of SGLang's server:\n{done.stderr[-2000:]}")
    # What SGLang prints while it is imported stands before it.
    document: dict[str, Any] = json.loads(done.stdout[done.stdout.index('{"openapi"') :])
    folder.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(document))
    whole.replace(kept)
    return document


def routes(document: Mapping[str, Any]) -> list[Route]:
    """Every operation of the document, in its order."""
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            schema = content.get("application/json", {}).get("schema")
            fields: tuple[Field, ...] = ()
            required: tuple[str, ...] = ()
            if schema is not None:
                body = _object(resolve(schema, document))
                fields = tuple(_fields(body, document))
                required = tuple(body.get("required", ()))
            found.append(Route(method.upper(), path, fields, required))
    return found


def resolve(schema: Any, document: Mapping[str, Any], depth: int = 6) -> dict[str, Any]:
    """``schema`` without references; what lies more than ``depth`` references deep is any value."""
    if not isinstance(schema, Mapping) or depth < 0:
        return {}
    if "$ref" in schema:
        name = str(schema["$ref"]).rsplit("/", 1)[-1]
        return resolve(document["components"]["schemas"].get(name, {}), document, depth - 1)
    found = dict(schema)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in found:
            found[key] = [resolve(part, document, depth) for part in found[key]]
    if isinstance(found.get("items"), Mapping):
        found["items"] = resolve(found["items"], document, depth)
    if isinstance(found.get("properties"), Mapping):
        found["properties"] = {name: resolve(part, document, depth - 1) for name, part in found["properties"].items()}
    return found


def alternatives(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be: the branches of `anyOf` and its like, flat, or the schema itself."""
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return [branch for part in schema[key] for branch in alternatives(part)]
    return [schema]


def _object(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((part for part in alternatives(schema) if "properties" in part), {})


def _fields(body: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Field]:
    for name, schema in body.get("properties", {}).items():
        yield Field((name,), schema)
        inside = _object(schema)
        if name in _INSIDE and not inside:
            inside = resolve({"$ref": _INSIDE[name]}, document)
        for inner, inner_schema in inside.get("properties", {}).items():
            yield Field((name, inner), inner_schema)
