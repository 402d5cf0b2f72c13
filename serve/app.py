"""The routes. `uvicorn serve.app:app`"""

import re
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from mnist import images, registry
from serve.engine import Engine
from serve.settings import Settings

IMAGE_STATUS = {"not_an_image": 415, "too_many_pixels": 413, "blank": 422}
UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


class Refused(Exception):
    """A request that gets an error answer: its status, code and message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.engine = Engine(Settings())
    await app.state.engine.start()
    yield
    app.state.engine.stop()


app = FastAPI(title="Small-image classifier", lifespan=lifespan)


@app.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@app.get("/ready", response_model=None)
async def ready(request: Request) -> dict[str, Any] | JSONResponse:
    """A model is loaded and has answered once; `passed_over`: engines that cannot run it."""
    engine: Engine = request.app.state.engine
    if engine.current is None:
        return JSONResponse({"status": "unavailable", "reason": engine.reason}, 503)
    classify = engine.current.classify
    answer = {"status": "ready", "model": engine.current.name, "engine": classify.engine}
    return answer | ({"passed_over": classify.passed_over} if classify.passed_over else {})


@app.get("/models")
def models(request: Request) -> dict[str, Any]:
    """Every saved model in brief."""
    info = registry.read(request.app.state.engine.settings.models)
    brief = [
        {
            "name": name,
            "dataset": record["dataset"]["name"],
            "network": record["model"]["name"],
            "test_accuracy": record["metrics"]["test"]["accuracy"],
            "created": record["created"],
        }
        for name, record in info["models"].items()
    ]
    return {"current": info["current"], "models": brief}


@app.get("/models/{name}")
def model(name: str, request: Request) -> dict[str, Any]:
    """All that is recorded of one model."""
    return registry.record(request.app.state.engine.settings.models, name)[1]


@app.post("/predict", openapi_extra=UPLOAD)
async def predict(
    request: Request,
    model: str | None = None,
    top: Annotated[int, Query(ge=1)] = 3,
    view: bool = False,
) -> dict[str, Any]:
    """Classify a raw picture, sent as the multipart field `file` or as the body itself."""
    engine: Engine = request.app.state.engine
    data, filename = await _picture(request, engine.settings.max_upload_bytes)
    return await engine.answer(data, filename, model, top, view)


async def _picture(request: Request, limit: int) -> tuple[bytes, str | None]:
    """The picture's bytes and its file's name, read into memory only, at most `limit` bytes."""

    async def bounded() -> AsyncGenerator[bytes]:
        refused = Refused(413, "too_large", f"the upload is over {limit} bytes (MAX_UPLOAD_BYTES)")
        if _content_length(request) > limit:
            raise refused
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise refused
            yield chunk

    kind = request.headers.get("content-type", "").lower()
    if not kind.startswith("multipart/form-data"):
        data, filename = b"".join([chunk async for chunk in bounded()]), None
    else:
        parser = MultiPartParser(request.headers, bounded(), max_files=1)
        parser.spool_max_size = limit  # below it, Starlette keeps a file in memory
        try:
            form = await parser.parse()
        except (MultiPartException, KeyError) as error:
            raise Refused(400, "bad_request", f"the form cannot be read: {error}") from error
        file, data, filename = form.get("file"), b"", None
        if isinstance(file, UploadFile):
            data, filename = await file.read(), file.filename
        await form.close()
    if not data:
        raise Refused(422, "missing_file", "no picture was sent; send it as `file` or as the body")
    return data, filename


def _content_length(request: Request) -> int:
    """What the header says, 0 without one; raises Refused where it says no number."""
    length = request.headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", length):
        message = f"Content-Length is {length[:20]!r}; it must be a number of bytes"
        raise Refused(400, "bad_request", message)
    return int(length)


def _error(request: Request, status: int, code: str, message: str) -> JSONResponse:
    request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
    body = {"error": {"code": code, "message": message, "request_id": request_id}}
    return JSONResponse(body, status, {"X-Request-ID": request_id})


@app.exception_handler(Refused)
def _refused(request: Request, error: Refused) -> JSONResponse:
    return _error(request, error.status, error.code, str(error))


@app.exception_handler(images.ImageError)
def _no_picture(request: Request, error: images.ImageError) -> JSONResponse:
    return _error(request, IMAGE_STATUS[error.code], error.code, str(error))


@app.exception_handler(registry.RegistryError)
def _no_model(request: Request, error: registry.RegistryError) -> JSONResponse:
    return _error(request, 503, "no_model", str(error))


@app.exception_handler(registry.UnknownModel)
def _unknown_model(request: Request, error: registry.UnknownModel) -> JSONResponse:
    return _error(request, 404, "unknown_model", str(error))


@app.exception_handler(ClientDisconnect)
def _gone(request: Request, error: ClientDisconnect) -> JSONResponse:
    return _error(request, 400, "bad_request", "the client left before the end of the upload")


@app.exception_handler(Exception)
def _internal(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again after this answer, so that the server logs its traceback."""
    response = _error(request, 500, "internal", "the server failed; its log says why")
    error.add_note(f"request_id {response.headers['x-request-id']}")
    return response


@app.exception_handler(RequestValidationError)
def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first.get('input')!r}"
    return _error(request, 400, "bad_request", message)


@app.exception_handler(HTTPException)
def _http(request: Request, error: HTTPException) -> JSONResponse:
    code = "not_found" if error.status_code == 404 else "bad_request"
    return _error(request, error.status_code, code, str(error.detail))
