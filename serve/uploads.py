"""The pictures of a request, read into memory only; bytes, number and time are limited."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import unquote

from fastapi import Request

from serve import parameters, schemas
from serve.admission import MAX_BODIES_BYTES
from serve.engine import Engine
from serve.errors import ApiError, bad_request, quote
from serve.forms import Form

FORM_BYTES = 10_000  # allowed for the parts of a form around each file
UPLOAD_S = 30  # limit for receiving a body
DATA_URL = re.compile(r"\s*data:[^,]*,", re.IGNORECASE)  # at the start of the text
TEXT = re.compile(rb"\s*(\{|data:)", re.IGNORECASE)  # JSON, or a data: URL
BASE64 = 'send {"image": "..."} with a picture in base64'
URL_SAFE = str.maketrans("-_", "+/")


async def read_picture(request: Request) -> tuple[bytes, str | None]:
    """The bytes of the form's `file`, or of the body, and the file's name."""
    limit = _limit(request)
    if not _is_form(request.headers.get("content-type", "")):
        data = check(request, await _read_body(request, limit))
        if TEXT.match(data):
            message = f"the body is text; POST /predict/base64 takes pictures as text: {BASE64}"
            raise ApiError(415, "not_an_image", message)
        return data, None
    file = (await _read_form(request, limit + FORM_BYTES, "file")).pictures()[0]
    return check(request, file.data), file.filename


async def read_base64(request: Request) -> bytes:
    """The bytes of the picture in a schemas.Base64 body."""
    body = await _read_body(request, _limit(request) * 4 // 3 + FORM_BYTES)
    data, others = await asyncio.to_thread(_decode_base64, body)
    parameters.check_fields(request, others)
    return check(request, data, "as `image`, in base64")


async def read_pictures(request: Request) -> list[tuple[bytes, str | None]]:
    """The bytes and names of the form's `files`, before check()."""
    max_files = _engine(request).settings.max_batch_files
    limit = min(max_files * (_limit(request) + FORM_BYTES), MAX_BODIES_BYTES)
    form = await _read_form(request, limit, "files", max_files)
    return [(part.data, part.filename) for part in form.pictures()]


async def read_tensors(request: Request) -> tuple[bytes, int]:
    """The body of a request with tensors, and how many pictures it may have."""
    max_files = _engine(request).settings.max_batch_files
    limit = min(max_files * (_limit(request) * 4 // 3 + FORM_BYTES), MAX_BODIES_BYTES)
    return await _read_body(request, limit), max_files


async def read_correction(request: Request) -> tuple[bytes, str]:
    """The bytes of the form's `file`, and its `label`, empty without one."""
    form = await _read_form(request, _limit(request) + FORM_BYTES, "file")
    label = next((part.data for part in form.parts if part.name == "label"), b"")
    return check(request, form.pictures()[0].data), label.decode(errors="replace")


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


def _is_form(content_type: str) -> bool:
    return content_type.lower().startswith("multipart/form-data")


async def _read_form(request: Request, limit: int, field: str, max_files: int = 1) -> Form:
    """A form of at most `limit` bytes, with its pictures in `field`."""
    content_type = request.headers.get("content-type", "")
    if not _is_form(content_type):
        sent = f"not {quote(content_type)}" if content_type else "and there is no Content-Type"
        example = f"`curl -F {field}=@7.png` sends one"
        raise bad_request(f"{request.url.path} takes a multipart form, {sent}; {example}")
    form = Form(content_type, field, max_files)
    async with _upload_timeout():
        async for chunk in _stream(request, limit):
            form.feed(chunk)
    form.feed(b"")
    parameters.check_fields(request, [part.name for part in form.parts])
    return form


def _decode_base64(body: bytes) -> tuple[bytes, list[str]]:
    """The picture of /predict/base64, as clients of all kinds encode it, and the other keys.

    Raises ApiError.
    """
    try:
        sent = schemas.Base64.model_validate_json(body.decode(json.detect_encoding(body)))
    except ValueError as error:  # also of pydantic
        raise bad_request(f"the body is not JSON with a text `image`; {BASE64}") from error
    return decode_base64(sent.image), [*(sent.model_extra or {})]


def decode_base64(text: str, name: str = "`image`", remedy: str = BASE64) -> bytes:
    """A picture in base64 or as a data: URL. Raises ApiError, with the name of the text."""
    text = unquote(text) if "%" in text else text
    text = text.lstrip("\ufeff")
    if prefix := DATA_URL.match(text):
        text = text[prefix.end() :]
    text = _join_lines(text).translate(URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise bad_request(f"{name} is not base64; {remedy}") from error


def _join_lines(text: str) -> str:
    """Base64 without whitespace; a space may be a `+` that was decoded as in the query of a URL."""
    text = "".join(line.strip() for line in text.replace("\t", "\n").splitlines())
    words = text.split(" ")
    joined = "".join(words)
    even_lines = len({len(word) for word in words[:-1]}) == 1 and len(joined) % 4 == 0
    return joined if len(text) % 4 or even_lines else "+".join(words)


async def _read_body(request: Request, limit: int) -> bytes:
    async with _upload_timeout():
        return b"".join([chunk async for chunk in _stream(request, limit)])


async def _stream(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """The body in chunks; raises ApiError over `limit` bytes, Busy over the limit of all bodies."""
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the body has the Content-Encoding {quote(encoding)}; send it uncompressed"
        raise bad_request(message)
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
        raise bad_request(f"the upload took over {UPLOAD_S} s; send a smaller picture") from error


def _content_length(request: Request) -> int:
    """Bytes, 0 without the header; raises ApiError if its value is not a number."""
    length = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise bad_request(f"Content-Length is {quote(length)}; it must be a number of bytes")
    return int(length)


def _too_large(request: Request, limit: int = 0) -> ApiError:
    """`limit`: of a whole body, which may have several pictures."""
    text = f"a picture may have {_limit(request)} bytes (MAX_UPLOAD_BYTES); send a smaller one"
    if limit >= MAX_BODIES_BYTES:
        text = f"all pictures together may have {limit} bytes; send fewer at a time"
    return ApiError(413, "too_large", f"the upload is too large: {text}")
