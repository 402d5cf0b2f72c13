"""The routes. `uvicorn serve.app:app`"""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from mnist import images, registry
from serve import feedback, schemas, uploads
from serve.batching import Busy
from serve.engine import Engine
from serve.metrics import Metrics
from serve.middleware import RequestMiddleware, busy_response, error_response, log_as_json
from serve.settings import Settings
from serve.uploads import Refused

IMAGE_STATUS = {"not_an_image": 415, "too_many_pixels": 413, "blank": 422}
STATIC = Path(__file__).parent / "static"
POLICY = (  # of the page: nothing from elsewhere, nothing inline
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ANSWERS = schemas.problems(400, 401, 404, 413, 415, 422, 429, 503)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    log_as_json()
    metrics = Metrics()
    app.state.engine = Engine(Settings(), metrics)
    await app.state.engine.start()
    yield
    await app.state.engine.stop()
    metrics.close()


class App(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """Outermost, so that rejected requests bypass the other middleware."""
        return RequestMiddleware(super().build_middleware_stack())


app = App(
    title="Small-image classifier",
    lifespan=lifespan,
    # It would look for another library's settings with each request; serve.metrics has its own.
    telemetry={"tracing": False, "metrics": False, "logs": False},
)


def _engine(request: Request) -> Engine:  # as a dependency of FastAPI's it would take 0.06 ms
    return request.app.state.engine


Name = Annotated[str | None, Query(description="a saved model; by default the current one")]
Top = Annotated[int, Query(ge=1, description="how many of the likeliest classes to list")]
View = Annotated[bool, Query(description="whether to return what the model saw")]


@app.get("/health")
async def health() -> dict[str, str]:
    """The process lives."""
    return {"status": "ok"}


@app.get("/ready", response_model=schemas.Ready, responses={503: {"model": schemas.Unavailable}})
async def ready(request: Request) -> JSONResponse:
    """A model is loaded and has answered."""
    engine = _engine(request)
    extra: dict[str, Any] = {"refused": engine.refused} if engine.refused else {}
    if engine.current is None:
        return JSONResponse({"status": "unavailable", "reason": engine.reason} | extra, 503)
    run = engine.current.run
    if run.passed_over:
        extra["passed_over"] = dict(run.passed_over)
    if engine.canary:
        extra["canary"] = engine.canary.name
    if engine.settings.feedback_dir:
        extra["feedback"] = True
    if engine.current.sample:
        extra["sample"] = registry.SAMPLE_NOTE
    answer = {"status": "ready", "model": engine.current.name, "engine": run.engine}
    return JSONResponse(answer | extra)


@app.get("/models", response_model=schemas.Models, responses=schemas.problems(503))
def models(request: Request) -> JSONResponse:
    """Every saved model in brief."""
    info = registry.read(_engine(request).folder)
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
    return JSONResponse({"current": info["current"], "models": brief})


@app.get("/models/{name}", openapi_extra=schemas.BY_NAME, responses=schemas.problems(404, 503))
def model(request: Request) -> dict[str, Any]:
    """All that is recorded of one model."""
    return registry.record(_engine(request).folder, request.path_params["name"])[1]


@app.get("/metrics", response_class=Response, responses=schemas.problems(401))
def metrics(request: Request) -> Response:
    """Requests, latencies, batches, models and predictions, as Prometheus reads them."""
    return Response(_engine(request).metrics.text(), media_type="text/plain; version=0.0.4")


@app.post(
    "/predict",
    openapi_extra=schemas.ONE,
    response_model=schemas.Answer,
    responses=ANSWERS,
)
async def predict(
    request: Request, model: Name = None, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify a raw picture, sent as the multipart field `file` or as the body itself."""
    engine = _engine(request)
    live = await engine.model(model)
    data, filename = await uploads.picture(request)
    return JSONResponse(await engine.answer(live, data, filename, top, view))


@app.post(
    "/predict/base64",
    openapi_extra=schemas.body("application/json", schemas.Base64.model_json_schema()),
    response_model=schemas.Answer,
    responses=ANSWERS,
)
async def predict_base64(
    request: Request, model: Name = None, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify a raw picture, sent in base64."""
    engine = _engine(request)
    live = await engine.model(model)
    data = await uploads.in_base64(request)
    return JSONResponse(await engine.answer(live, data, None, top, view))


@app.post(
    "/predict/batch",
    openapi_extra=schemas.SEVERAL,
    response_model=schemas.Batch,
    responses=schemas.problems(400, 401, 404, 413, 422, 429, 503),
)
async def predict_batch(
    request: Request, model: Name = None, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify several raw pictures, each sent as the multipart field `files`."""
    engine = _engine(request)
    live = await engine.model(model)
    files = await uploads.pictures(request)
    # At most so many wait, or the last would be late for its own neighbours; one does, so that no
    # thread is idle.
    turns = asyncio.Semaphore(engine.threads + 1)

    async def answer(data: bytes, filename: str | None) -> dict[str, Any]:
        try:
            picture = uploads.checked(request, data)
            async with turns:
                return await engine.answer(live, picture, filename, top, view)
        except (Refused, Busy, images.ImageError) as error:
            code = "busy" if isinstance(error, Busy) else error.code
            if isinstance(error, Busy):
                engine.metrics.rejected.labels(error.why).inc()
            about = {"code": code, "message": str(error), "request_id": request.state.request_id}
            return {"filename": filename, "error": about}

    return JSONResponse({"results": await asyncio.gather(*(answer(*file) for file in files))})


@app.post(
    "/feedback",
    status_code=201,
    openapi_extra=schemas.CORRECTION,
    response_model=schemas.Kept,
    responses=ANSWERS,
)
async def put_right(request: Request, model: Name = None) -> JSONResponse:
    """Keep a picture with its true class, one of the model's, if FEEDBACK_DIR is set."""
    engine = _engine(request)
    settings = engine.settings
    if settings.feedback_dir is None:
        raise Refused(404, "not_found", "corrections are not kept here (FEEDBACK_DIR)")
    live = await engine.model(model)
    picture, label = await uploads.correction(request)
    if label not in live.record["dataset"]["classes"]:
        said = f"label {label[:40]!r}" if label else "no label was sent"
        raise Refused(400, "bad_request", f"{said}; it must be a class of {live.name}")
    where, most = settings.feedback_dir, settings.feedback_max_bytes
    try:
        await asyncio.to_thread(feedback.keep, where, most, picture, label, settings.max_pixels)
    except feedback.Full as error:
        raise Refused(413, "full", str(error)) from error
    return JSONResponse({"label": label}, 201)


# --- the page ------------------------------------------------------------------------------------


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": POLICY})


app.mount("/static", StaticFiles(directory=STATIC), "static")


# --- errors --------------------------------------------------------------------------------------


@app.exception_handler(Refused)
async def _refused(request: Request, error: Refused) -> JSONResponse:
    return error_response(request.scope, error.status, error.code, str(error))


@app.exception_handler(images.ImageError)
async def _no_picture(request: Request, error: images.ImageError) -> JSONResponse:
    return error_response(request.scope, IMAGE_STATUS[error.code], error.code, str(error))


@app.exception_handler(Busy)
async def _busy(request: Request, error: Busy) -> JSONResponse:
    return busy_response(request.scope, error)


@app.exception_handler(registry.RegistryError)
async def _no_model(request: Request, error: registry.RegistryError) -> JSONResponse:
    return error_response(request.scope, 503, "no_model", str(error))


@app.exception_handler(registry.UnknownModel)
async def _unknown_model(request: Request, error: registry.UnknownModel) -> JSONResponse:
    return error_response(request.scope, 404, "unknown_model", str(error))


@app.exception_handler(ClientDisconnect)
async def _gone(request: Request, error: ClientDisconnect) -> JSONResponse:
    message = "the client left before the end of the upload"
    return error_response(request.scope, 400, "bad_request", message)


@app.exception_handler(Exception)
async def _internal(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again after this answer, so that the server logs its traceback."""
    error.add_note(f"request_id {request.state.request_id}")
    return error_response(request.scope, 500, "internal", "the server failed; its log says why")


@app.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    message = f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first.get('input')!r}"
    return error_response(request.scope, 400, "bad_request", message)


@app.exception_handler(HTTPException)
async def _http(request: Request, error: HTTPException) -> JSONResponse:
    code = "not_found" if error.status_code == 404 else "bad_request"
    return error_response(request.scope, error.status_code, code, str(error.detail), error.headers)


# --- after all imports (serve/__init__.py) ------------------------------------------------------

gc.freeze()  # never to be looked through
gc.enable()
