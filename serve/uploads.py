"""The pictures of a request, read into memory only; bytes, number and time are limited."""

import asyncio
import base64
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import multipart
from fastapi import Request
from pydantic import ValidationError

from serve import schemas
from serve.admission import MAX_BODIES_BYTES
from serve.engine import Engine

FORM_BYTES = 10_000  # allowed for the parts of a form around each file
MAX_FIELDS = 20  # of a form, besides its files
UPLOAD_S = 30  # limit for receiving a body


class ApiError(Exception):
    """An error response: its status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


async def read_picture(request: Request) -> tuple[bytes, str | None]:
    """The bytes of the form's `file`, or of the body, and the file's name."""
    limit = _limit(request)
    content_type = request.headers.get("content-type", "").lower()
    if not content_type.startswith("multipart/form-data"):
        return check(request, await _read_body(request, limit)), None
    parts = await _read_form(request, limit + FORM_BYTES, 1)
    file = next((part for part in parts if part.is_file("file")), None)
    return (check(request, file.data), file.filename) if file else (check(request, b""), None)


async def read_base64(request: Request) -> bytes:
    """The bytes of the picture in a schemas.Base64 body."""
    limit = _limit(request)
    try:
        body = await _read_body(request, limit * 4 // 3 + FORM_BYTES)
        data = await asyncio.to_thread(_decode_base64, body)
    except (ValidationError, ValueError) as error:
        message = 'the body must be {"image": "..."} with a picture in base64'
        raise ApiError(400, "bad_request", message) from error
    return check(request, data, "as `image`, in base64")


async def read_pictures(request: Request) -> list[tuple[bytes, str | None]]:
    """The bytes and names of the form's `files`, before check()."""
    max_files = _engine(request).settings.max_batch_files
    limit = min(max_files * (_limit(request) + FORM_BYTES), MAX_BODIES_BYTES)
    parts = await _read_form(request, limit, max_files)
    files = [(part.data, part.filename) for part in parts if part.is_file("files")]
    if not files:
        raise ApiError(422, "missing_file", "no picture was sent; send some as `files`")
    return files


async def read_correction(request: Request) -> tuple[bytes, str]:
    """The bytes of the form's `file`, and its `label`, empty without one."""
    parts = await _read_form(request, _limit(request) + FORM_BYTES, 1)
    fields = {part.name: part.data for part in parts}
    label = fields.get("label", b"").decode(errors="replace")
    return check(request, fields.get("file", b"")), label


def check(request: Request, data: bytes, how: str = "as `file` or as the body") -> bytes:
    """The bytes of a picture; raises ApiError if there are none, or over MAX_UPLOAD_BYTES."""
    if len(data) > _limit(request):
        raise _too_large(request)
    if not data:
        raise ApiError(422, "missing_file", f"no picture was sent; send it {how}")
    return data


# --- reading -------------------------------------------------------------------------------------


def _engine(request: Request) -> Engine:
    return request.app.state.engine


def _limit(request: Request) -> int:
    """Largest picture, in bytes."""
    return _engine(request).settings.max_upload_bytes


class Part:
    """A part of a multipart form; `chunks` grows while the form is read."""

    def __init__(self, segment: multipart.MultipartSegment) -> None:
        self.name, self.filename = segment.name, segment.filename
        self.chunks: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    def is_file(self, name: str) -> bool:
        return self.name == name and self.filename is not None


async def _read_form(request: Request, limit: int, max_files: int) -> list[Part]:
    """The parts of a multipart form of at most `limit` bytes and `max_files` files."""
    options = multipart.parse_options_header(request.headers.get("content-type", ""))[1]
    boundary, parts = options.get("boundary", ""), list[Part]()
    try:
        async with _upload_timeout():
            segments = max_files + MAX_FIELDS
            with multipart.PushMultipartParser(boundary, max_segment_count=segments) as parser:
                async for chunk in _stream(request, limit):
                    _collect(parts, parser.parse(chunk), max_files)
    except multipart.MultipartError as error:
        raise ApiError(400, "bad_request", f"the form cannot be read: {error}") from error
    return parts


def _collect(parts: list[Part], events: Iterable[Any], max_files: int) -> None:
    """Add the parser's next events: the head of a part, some of its bytes, or None at its end."""
    for event in events:
        if isinstance(event, bytes):
            parts[-1].chunks.append(event)
        elif event is not None:
            parts.append(Part(event))
            if sum(part.filename is not None for part in parts) > max_files:
                raise _too_many_files(max_files)


def _decode_base64(body: bytes) -> bytes:
    """The picture of /predict/base64; raises ValueError."""
    text = schemas.Base64.model_validate_json(body).image
    if text.startswith("data:"):
        text = text.partition(",")[2]
    return base64.b64decode("".join(text.split()), validate=True)


async def _read_body(request: Request, limit: int) -> bytes:
    async with _upload_timeout():
        return b"".join([chunk async for chunk in _stream(request, limit)])


async def _stream(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """The body in chunks; raises ApiError over `limit` bytes, Busy over the limit of all bodies."""
    if _content_length(request) > limit:
        raise _too_large(request, limit)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(request, limit)
        _engine(request).admission.add_body_bytes(request.scope["state"], len(chunk))
        yield chunk


@asynccontextmanager
async def _upload_timeout() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(UPLOAD_S):
            yield
    except TimeoutError as error:
        raise ApiError(400, "bad_request", f"the upload took over {UPLOAD_S} s") from error


def _content_length(request: Request) -> int:
    """Bytes, 0 without the header; raises ApiError if its value is no number."""
    length = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        message = f"Content-Length is {length[:20]!r}; it must be a number of bytes"
        raise ApiError(400, "bad_request", message)
    return int(length)


def _too_many_files(max_files: int) -> ApiError:
    message = f"the form has over {max_files} files (MAX_BATCH_FILES)"
    if max_files == 1:
        message = "the form has several files; /predict/batch takes them, as `files`"
    return ApiError(413, "too_many_files", message)


def _too_large(request: Request, limit: int = 0) -> ApiError:
    """`limit` is that of a whole body, which has more than a picture, or several pictures."""
    text = f"a picture may have {_limit(request)} bytes (MAX_UPLOAD_BYTES)"
    if limit >= MAX_BODIES_BYTES:
        text = f"all pictures together may have {limit} bytes; send fewer at a time"
    return ApiError(413, "too_large", f"the upload is too large: {text}")
