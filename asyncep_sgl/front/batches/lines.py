"""The lines of a batch's files: requests read, answers written. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import orjson

from asyncep_sgl.front.batches.estimates import answer_bytes
from asyncep_sgl.front.batches.records import MOST_REQUESTS, shown

# More than so many are not listed; the file has to be looked at anyhow.
_MOST_PROBLEMS = 100
_TOO_LONG = "line_too_long"
_LONGEST_ID = 512
MOST_LINE_BYTES = 16 << 20
_LINE_BREAKS = tuple((chr(code).encode(), f"\\u{code:04x}".encode()) for code in (0x85, 0x2028, 0x2029))


@dataclass(frozen=True)
class RequestLine:
    """Where a request stands in its file.

    Attributes:
        number: line, counted from 1.
        custom_id: the client's name of it.
        offset, length: its bytes in the file.
        estimate: bytes that its answer is expected to take; known where the line has just been read.
    """

    number: int
    custom_id: str
    offset: int
    length: int
    estimate: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Problem:
    """Why a file is refused."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        """In OpenAI's schema."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


def read_lines(lines: Iterable[bytes], endpoint: str) -> tuple[list[RequestLine], list[Problem]]:
    """The requests of a file, and everything that is wrong with it. A file with a problem is not begun.

    Args:
        lines: with their line ends.
        endpoint: what all of them have to be for.
    """
    requests: list[RequestLine] = []
    problems: list[Problem] = []
    first: dict[str, int] = {}
    offset = 0
    for number, line in enumerate(lines, start=1):
        here, offset = offset, offset + len(line)
        if not line.strip():
            continue
        found = _read_line(line, number, endpoint)
        if not isinstance(found, Problem):
            name, estimate = found
            if name in first:
                message = f"custom_id {shown(name)} is also that of line {first[name]}"
                found = Problem("duplicate_custom_id", message, number, "custom_id")
            else:
                first[name] = number
                requests.append(RequestLine(number, name, here, len(line), estimate))
        if isinstance(found, Problem):
            problems.append(found)
            if found.code == _TOO_LONG:
                # What follows is the rest of that line.
                break
            if len(problems) == _MOST_PROBLEMS:
                break
        if len(requests) > MOST_REQUESTS:
            problems.append(
                Problem("too_many_requests", f"more than {MOST_REQUESTS} requests; use several files", number)
            )
            break
    if not requests and not problems:
        problems.append(Problem("empty_file", "the file has no request; each line is one"))
    return requests, problems


def split(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, none of them much longer than what is taken."""
    while line := file.readline(MOST_LINE_BYTES + 1):
        yield line


def body_of(line: bytes, custom_id: str) -> bytes:
    """The body of a line that `read_lines` has taken.

    Raises:
        ValueError: it is no longer there; the file has changed.
    """
    fields = orjson.loads(line)
    if not isinstance(fields, dict) or fields.get("custom_id") != custom_id:
        raise ValueError("another line stands there now")
    return orjson.dumps(fields["body"])


def _read_line(line: bytes, number: int, endpoint: str) -> tuple[str, int] | Problem:
    """The custom_id of a good line, and the bytes that its answer is expected to take."""
    if len(line) > MOST_LINE_BYTES:
        return Problem(_TOO_LONG, f"longer than {MOST_LINE_BYTES >> 20} MiB; divide the request", number)
    try:
        fields = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return Problem("invalid_json_line", f"not JSON: {error}", number)
    if not isinstance(fields, dict):
        return Problem("invalid_json_line", f"a JSON object is needed, not {type(fields).__name__}", number)
    name = fields.get("custom_id")
    if not isinstance(name, str) or not name or len(name) > _LONGEST_ID:
        message = f"custom_id: a string of 1 to {_LONGEST_ID} characters is needed"
        return Problem("invalid_custom_id", message, number, "custom_id")
    if fields.get("method", "POST") != "POST":
        return Problem("invalid_method", f"method: POST is needed, not {shown(fields['method'])}", number, "method")
    if fields.get("url") != endpoint:
        message = f"url: {shown(fields.get('url'))} is not the batch's endpoint {endpoint}"
        return Problem("mismatched_endpoint", message, number, "url")
    body = fields.get("body")
    if not isinstance(body, dict):
        return Problem("missing_body", "body: a JSON object is needed", number, "body")
    if body.get("stream"):
        return Problem("stream_not_supported", "body.stream: answers go to a file; leave it out", number, "body.stream")
    return name, answer_bytes(endpoint, body, len(line))


def answer_line(batch: str, number: int, custom_id: str, status: int, body: bytes) -> bytes:
    """A line for a request that was answered, well or not.

    Args:
        body: the endpoint's answer, JSON.
    """
    response = {"status_code": status, "request_id": f"{batch}-{number}", "body": orjson.Fragment(body)}
    return _line(batch, number, custom_id, response, None)


def error_line(batch: str, number: int, custom_id: str, code: str, message: str) -> bytes:
    """A line for a request that was not answered."""
    return _line(batch, number, custom_id, None, {"code": code, "message": message})


def _line(
    batch: str, number: int, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None
) -> bytes:
    # The same line each time it is written: a file that is put together twice is the same file.
    record = {"id": f"batch_req_{batch}-{number}", "custom_id": custom_id, "response": response, "error": error}
    line = orjson.dumps(record)
    # Characters at which programs such as Python's splitlines break a text, though JSON does not ask for their escape.
    for character, escape in _LINE_BREAKS:
        line = line.replace(character, escape)
    return line + b"\n"
