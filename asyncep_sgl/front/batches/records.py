"""What the Batch API's clients see: batches, files, errors, and what may be asked for. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
UNFINISHED: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")
NEED_INPUT: tuple[Status, ...] = ("validating", "in_progress")
"""Of a batch whose input is still to be read."""
STATUSES: tuple[Status, ...] = get_args(Status)

ENDPOINTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/score",
    "/v1/classify",
    "/v1/rerank",
    "/v1/embeddings",
    "/generate",
)
"""Routes a batch's requests may be for: POST, a JSON object in, JSON out."""

# The limits of OpenAI's own service, which clients are written against.
MOST_FILE_BYTES = 200 * 1000 * 1000
MOST_REQUESTS = 50_000
MOST_METADATA = 16
MOST_FILENAME = 255
_LONGEST_WINDOW = 30 * 86400
_LONGEST_SHOWN = 100
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def shown(value: Any) -> str:
    """A client's value as a message may show it: cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


class ApiError(Exception):
    """A refusal, as the client reads it.

    Attributes:
        status: HTTP status.
        message: one sentence that names the field and the fix.
        param: the field.
        code: a word for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """In OpenAI's schema."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class FileRecord:
    """A file that is kept.

    Attributes:
        id: ``file-…``.
        purpose: ``batch``, or ``batch_output`` for what the server wrote.
        filename: as uploaded.
        size: bytes.
        created_at, expires_at: seconds since 1970; None never expires.
        owner: name of the caller whose it is; empty where the server had no keys.
    """

    id: str
    purpose: str
    filename: str
    size: int
    created_at: int
    expires_at: int | None = None
    owner: str = ""

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's schema."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True)
class BatchRecord:
    """A batch as it stands.

    Attributes:
        id: ``batch_…``.
        model: the model it was created for; a server of another leaves it alone.
        endpoint: one of `ENDPOINTS`.
        input_file, output_file, error_file: ids of files; None where there is none (yet).
        window: the completion window as it was given.
        status: see OpenAI's.
        times: when it got into which status, seconds since 1970, by the status' name.
        created_at, expires_at: seconds since 1970.
        total, completed, failed: requests; failed ones were answered with an error, or not at all.
        errors: why it failed, or why none of its requests was begun.
        metadata: the client's own.
        output_seconds: seconds its files are kept; None as long as any.
        owner: name of the caller whose it is; empty where the server had no keys.
        quota: most bytes of the owner's files, by the owner's key; None has the server's bound.
        estimate: bytes that its answers are expected to take; 0 until its input was read.
        readings: times that its input was begun to be read since it last was read whole.
        quarantined: lines during each of which, sent alone, the server ended.
    """

    id: str
    model: str
    endpoint: str
    input_file: str
    window: str
    status: Status
    created_at: int
    expires_at: int
    times: Mapping[str, int]
    output_file: str | None = None
    error_file: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    errors: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str] | None = None
    output_seconds: int | None = None
    owner: str = ""
    quota: int | None = None
    estimate: int = 0
    readings: int = 0
    quarantined: int = 0

    def as_json(self, waits: str | None = None) -> dict[str, Any]:
        """In OpenAI's schema.

        Args:
            waits: why an unfinished batch does not go on at the moment. It is shown as an entry of ``errors``.
        """
        errors = list(self.errors)
        if waits is not None and self.status in UNFINISHED:
            errors.append({"code": "waiting", "message": waits, "line": None, "param": None})
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **{f"{status}_at": self.times.get(status) for status in STATUSES if status != "validating"},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": dict(self.metadata) if self.metadata is not None else None,
        }


@dataclass(frozen=True)
class Order:
    """What ``POST /v1/batches`` asks for, checked.

    Attributes:
        seconds: length of the completion window.
        window: as the client wrote it.
        output_seconds: how long the output is kept; None for ever.
    """

    input_file: str
    endpoint: str
    window: str
    seconds: int
    metadata: Mapping[str, str] | None
    output_seconds: int | None


def read_order(body: Any) -> Order:
    """Checks the body of ``POST /v1/batches``.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"a JSON object is needed, not {type(body).__name__}")
    known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
    for field in body:
        if field not in known:
            message = f"{shown(field)[1:-1]}: unknown field; use {', '.join(sorted(known))}"
            raise ApiError(400, message, param=field[:_LONGEST_SHOWN])
    for field in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(body.get(field), str):
            raise ApiError(400, f"{field}: a string is needed, not {shown(body.get(field))}", param=field)
    endpoint = body["endpoint"]
    if endpoint not in ENDPOINTS:
        raise ApiError(
            400, f"endpoint: {shown(endpoint)} takes no batches; use {', '.join(ENDPOINTS)}", param="endpoint"
        )
    return Order(
        body["input_file_id"],
        endpoint,
        body["completion_window"],
        window_seconds(body["completion_window"]),
        _metadata(body.get("metadata")),
        expiry_seconds(body.get("output_expires_after"), "output_expires_after"),
    )


def window_seconds(text: str) -> int:
    """Seconds of a completion window such as ``24h``.

    Raises:
        ApiError: 400; not a window.
    """
    found = re.fullmatch(r"([0-9]{1,8})([smhd])", text)
    seconds = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_WINDOW:
        raise ApiError(
            400,
            f"completion_window: {shown(text)}: write it as 24h, 90m or 600s, at most 30d",
            param="completion_window",
        )
    return seconds


def expiry_seconds(value: Any, field: str) -> int | None:
    """Seconds a file is kept, from ``{"anchor": "created_at", "seconds": N}``; None if nothing was said.

    Raises:
        ApiError: 400; something else.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping) or value.get("anchor") != "created_at":
        raise ApiError(400, f'{field}: write it as {{"anchor": "created_at", "seconds": N}}', param=field)
    seconds = value.get("seconds")
    if isinstance(seconds, str) and re.fullmatch(r"[0-9]{1,8}", seconds):
        seconds = int(seconds)
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 3600 <= seconds <= _LONGEST_WINDOW:
        raise ApiError(400, f"{field}.seconds: {shown(seconds)}: use 3600 (an hour) to {_LONGEST_WINDOW}", param=field)
    return seconds


def _metadata(value: Any) -> Mapping[str, str] | None:
    if value is None:
        return None
    good = isinstance(value, dict) and len(value) <= MOST_METADATA
    if not good or not all(isinstance(v, str) and len(k) <= 64 and len(v) <= 512 for k, v in value.items()):
        raise ApiError(
            400,
            f"metadata: an object of at most {MOST_METADATA} strings of at most 512 characters, keys of at most 64",
            param="metadata",
        )
    return dict(value)
