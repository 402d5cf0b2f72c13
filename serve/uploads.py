"""What a request holds: pictures, read into memory only, bounded in bytes, number and time."""

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
from serve.engine import BODIES_BYTES, Engine

FORM_BYTES = 10_000  # for what a form has around each of its files
FIELDS = 20  # of a form, beside its files
UPLOAD_S = 30  # within which a body must have come


class Refused(Exception):
    """A request that gets an error answer: its status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


async def picture(request: Request) -> tuple[bytes, str | None]:
    """The bytes of the form's `file`, or of the body, and the file's name."""
    limit = _limit(request)
    kind = request.headers.get("content-type", "").lower()
    if not kind.startswith("multipart/form-data"):
        return checked(request, await _body(request, limit)), None
    parts = await _form(request, limit + FORM_BYTES, 1)
    file = next((part for part in parts if part.is_file("file")), None)
    return (checked(request, file.data), file.filename) if file else (checked(request, b""), None)


async def in_base64(request: Request) -> bytes:
    """The picture's bytes that the body has in base64, as schemas.Base64 says."""
    limit = _limit(request)
    try:
        body = await _body(request, limit * 4 // 3 + FORM_BYTES)
        data = await asyncio.to_thread(_from_base64, body)
    except (ValidationError, ValueError) as error:
        message = 'the body must be {"image": "..."} with a picture in base64'
        raise Refused(400, "bad_request", message) from error
    return checked(request, data, "as `image`, in base64")


async def pictures(request: Request) -> list[tuple[bytes, str | None]]:
    """The bytes and names of the form's `files`; each is still to be checked."""
    most = _engine(request).settings.max_batch_files
    limit = min(most * (_limit(request) + FORM_BYTES), BODIES_BYTES)
    parts = await _form(request, limit, most)
    files = [(part.data, part.filename) for part in parts if part.is_file("files")]
    if not files:
        raise Refused(422, "missing_file", "no picture was sent; send some as `files`")
    return files


async def correction(request: Request) -> tuple[bytes, str]:
    """The bytes of the form's `file`, and its `label`, empty where there is none."""
    parts = await _form(request, _limit(request) + FORM_BYTES, 1)
    sent = {part.name: part.data for part in parts}
    return checked(request, sent.get("file", b"")), sent.get("label", b"").decode(errors="replace")


def checked(request: Request, data: bytes, how: str = "as `file` or as the body") -> bytes:
    """A picture's bytes, if there are some, and no more than allowed."""
    if len(data) > _limit(request):
        raise _too_large(request)
    if not data:
        raise Refused(422, "missing_file", f"no picture was sent; send it {how}")
    return data


# --- reading -------------------------------------------------------------------------------------


def _engine(request: Request) -> Engine:
    return request.app.state.engine


def _limit(request: Request) -> int:
    """Bytes of a picture."""
    return _engine(request).settings.max_upload_bytes


class Part:
    """Of a multipart form, as it comes."""

    def __init__(self, about: multipart.MultipartSegment) -> None:
        self.name, self.filename = about.name, about.filename
        self.chunks: list[bytes] = []

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    def is_file(self, name: str) -> bool:
        return self.name == name and self.filename is not None


async def _form(request: Request, limit: int, most: int) -> list[Part]:
    """The parts of a multipart form of at most `limit` bytes and `most` files."""
    kind = multipart.parse_options_header(request.headers.get("content-type", ""))[1]
    boundary, parts = kind.get("boundary", ""), list[Part]()
    try:
        async with _in_time():
            with multipart.PushMultipartParser(boundary, max_segment_count=most + FIELDS) as parser:
                async for chunk in _bounded(request, limit):
                    _add(parts, parser.parse(chunk), most)
    except multipart.MultipartError as error:
        raise Refused(400, "bad_request", f"the form cannot be read: {error}") from error
    return parts


def _add(parts: list[Part], events: Iterable[Any], most: int) -> None:
    """What a parser finds next: the head of a part, some of its bytes, or its end."""
    for event in events:
        if isinstance(event, bytes):
            parts[-1].chunks.append(event)
        elif event is not None:
            parts.append(Part(event))
            if sum(part.filename is not None for part in parts) > most:
                raise _too_many(most)


def _from_base64(body: bytes) -> bytes:
    """The picture of /predict/base64; raises ValueError."""
    text = schemas.Base64.model_validate_json(body).image
    if text.startswith("data:"):
        text = text.partition(",")[2]
    return base64.b64decode("".join(text.split()), validate=True)


async def _body(request: Request, limit: int) -> bytes:
    async with _in_time():
        return b"".join([chunk async for chunk in _bounded(request, limit)])


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """The body in chunks, as long as it is no larger than allowed."""
    if _content_length(request) > limit:
        raise _too_large(request, limit)
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(request, limit)
        _engine(request).add_body_bytes(request.scope["state"], len(chunk))
        yield chunk


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(UPLOAD_S):
            yield
    except TimeoutError as error:
        raise Refused(400, "bad_request", f"the upload took over {UPLOAD_S} s") from error


def _content_length(request: Request) -> int:
    """What the header says, 0 without one; raises Refused where it says no number."""
    length = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        message = f"Content-Length is {length[:20]!r}; it must be a number of bytes"
        raise Refused(400, "bad_request", message)
    return int(length)


def _too_many(most: int) -> Refused:
    message = f"the form has over {most} files (MAX_BATCH_FILES)"
    if most == 1:
        message = "the form has several files; /predict/batch takes them, as `files`"
    return Refused(413, "too_many_files", message)


def _too_large(request: Request, limit: int = 0) -> Refused:
    """`limit` is that of the whole body, which may have more around a picture, or several."""
    text = f"a picture may have {_limit(request)} bytes (MAX_UPLOAD_BYTES)"
    if limit >= BODIES_BYTES:
        text = f"all pictures together may have {limit} bytes; send fewer at a time"
    return Refused(413, "too_large", f"the upload is too large: {text}")
