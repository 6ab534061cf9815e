"""An upload's form, read as it comes: the file's bytes go where they belong at once, and nothing waits in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from asyncep_sgl.front.batches.records import MOST_FILENAME, ApiError

_MOST_FIELDS = 8
_MOST_FIELD_BYTES = 1024


@dataclass
class Form:
    """What a form said.

    Attributes:
        fields: text by name.
        filename: of the file; None if there was none.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


@dataclass
class _Part:
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


async def read_form(
    content_type: str, body: AsyncIterator[bytes], most: int, write: Callable[[bytes], Awaitable[None]]
) -> Form:
    """Reads ``multipart/form-data`` with one file, named ``file``.

    Args:
        content_type: the request's header.
        body: the request's body as it comes.
        most: bytes of the body.
        write: takes the file's bytes.

    Raises:
        ApiError: 400; no such form. 413; larger than `most`.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "file: a file is needed, sent as multipart/form-data with a boundary", param="file")
    reader = _Reader()
    try:
        parser = reader.parser(options[b"boundary"])
        size = 0
        async for piece in body:
            size += len(piece)
            if size > most:
                raise ApiError(413, f"the form is larger than {most} bytes", param="file")
            parser.write(piece)
            for data in reader.taken():
                await write(data)
        parser.finalize()
    except FormParserError as error:
        raise ApiError(400, f"the form cannot be read: {str(error)[:200]}") from error
    if not reader.ended:
        raise ApiError(400, "the form cannot be read: it ends before its last boundary")
    return reader.form


class _Reader:
    """The parser's callbacks."""

    def __init__(self) -> None:
        self.form = Form()
        self.ended = False
        self._part = _Part()
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._data: list[bytes] = []

    def parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header,
                "on_header_value": self._on_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._on_data,
                "on_part_end": self._end,
                "on_end": self._on_end,
            },
        )

    def taken(self) -> list[bytes]:
        """The file's bytes since the last call."""
        data, self._data = self._data, []
        return data

    def _begin(self) -> None:
        self._part, self._headers = _Part(), {}

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"name" not in options:
            raise ApiError(400, "the form cannot be read: a part has no name in its Content-Disposition")
        # What is no UTF-8 is shown as such; a name need not be more than readable.
        self._part.name = options[b"name"].decode(errors="replace")
        if b"filename" not in options:
            if len(self.form.fields) >= _MOST_FIELDS:
                raise ApiError(400, f"the form has more than {_MOST_FIELDS} fields")
            return
        if self._part.name != "file" or self.form.filename is not None:
            raise ApiError(400, "file: one file is taken, as the field 'file'", param="file")
        self._part.is_file = True
        self.form.filename = options[b"filename"].decode(errors="replace")
        if len(self.form.filename) > MOST_FILENAME:
            raise ApiError(400, f"file: its name is longer than {MOST_FILENAME} characters", param="file")

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._data.append(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > _MOST_FIELD_BYTES:
            message = f"{self._part.name[:100]}: more than {_MOST_FIELD_BYTES} bytes"
            raise ApiError(400, message, param=self._part.name[:100])

    def _end(self) -> None:
        if not self._part.is_file:
            self.form.fields[self._part.name] = self._part.value.decode(errors="replace")

    def _on_end(self) -> None:
        self.ended = True
