"""The routes of the server. `uvicorn serve.app:app`"""

from serve import startup

# isort: split
import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import ASGIApp

from mnist import images, registry
from serve import feedback, open_inference, sagemaker, schemas, uploads, visibility
from serve.admission import Busy
from serve.dependencies import ChosenModel, CurrentEngine, Top, View
from serve.engine import Engine
from serve.errors import ApiError, bad_request, quote
from serve.handlers import HANDLERS
from serve.metrics import Metrics
from serve.middleware import RequestMiddleware, log_as_json
from serve.settings import Settings
from serve.upgrades import ignore_upgrades

STATIC = Path(__file__).parent / "static"
PAGE_POLICY = (  # nothing from other origins, nothing inline
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

log = logging.getLogger("serve")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    log_as_json()
    ignore_upgrades()
    metrics = Metrics()
    app.state.engine = Engine(Settings(), metrics)
    await app.state.engine.start()
    yield
    await app.state.engine.stop()
    metrics.close()


class App(FastAPI):
    def build_middleware_stack(self) -> ASGIApp:
        """Wrap all other middleware, so that rejected requests bypass it."""
        return RequestMiddleware(super().build_middleware_stack())


app = App(
    title="Small-image classifier",
    lifespan=lifespan,
    exception_handlers=HANDLERS,
    redoc_url=None,
    redirect_slashes=False,  # RequestMiddleware drops them
    # FastAPI would read OpenTelemetry's settings in each request; serve.metrics is used instead.
    telemetry={"tracing": False, "metrics": False, "logs": False},
)


def _json(content: Any) -> Response:
    """A part of model_info.json as a response: it may have NaN, and names that are not UTF-8."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return Response(json.dumps(finite), media_type="application/json")


@app.get("/health")
async def health() -> dict[str, str]:
    """Whether the process is alive."""
    return {"status": "ok"}


@app.get("/ready", response_model=schemas.Ready, responses={503: {"model": schemas.Unavailable}})
async def ready(request: Request, engine: CurrentEngine) -> JSONResponse:
    """Whether a model is loaded and has answered."""
    extra: dict[str, Any] = {}
    if engine.refused:
        extra["refused"] = visibility.reasons(request, engine.refused)
    if engine.current is None:
        reason = visibility.reason(request, engine.reason)
        return JSONResponse({"status": "unavailable", "reason": reason} | extra, 503)
    classifier = engine.current.classifier
    if classifier.skipped_engines:
        extra["passed_over"] = visibility.reasons(request, classifier.skipped_engines)
    limits = classifier.set_limits
    if limits and limits.coverage < engine.settings.coverage:
        extra["coverage"] = limits.coverage
    if engine.canary:
        extra["canary"] = engine.canary.name
    if engine.settings.feedback_dir:
        extra["feedback"] = True
    if engine.current.is_sample:
        extra["sample"] = registry.SAMPLE_NOTE
    answer = {"status": "ready", "model": engine.current.name, "engine": classifier.engine}
    return JSONResponse(answer | extra)


@app.get(
    "/models",
    response_model=schemas.Models,
    responses={503: {"model": schemas.ErrorResponse, "description": schemas.CODES[503]}},
)
def models(engine: CurrentEngine) -> Response:
    """A summary of every saved model."""
    info = registry.read(engine.folder)
    summaries = [
        {
            "name": name,
            "dataset": record["dataset"]["name"],
            "network": record["model"]["name"],
            "test_accuracy": record["metrics"]["test"]["accuracy"],
            "created": record["created"],
        }
        for name, record in info["models"].items()
    ]
    return _json({"current": info["current"], "models": summaries})


@app.get(
    "/models/{name}",
    openapi_extra=schemas.NAME_PARAMETER,
    response_model=dict[str, Any],
    responses=schemas.error_responses(404, 503),
)
def model(request: Request, engine: CurrentEngine) -> Response:
    """The record of one model; if API keys are set, its public part without one."""
    record = registry.record(engine.folder, request.path_params["name"])[1]
    return _json(visibility.record(request, record))


@app.get("/metrics", response_class=Response, responses=schemas.error_responses(401))
def metrics(engine: CurrentEngine) -> Response:
    """Requests, latencies, batches, models and predictions, in the text format of Prometheus."""
    return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")


@app.post(
    "/predict",
    openapi_extra=schemas.ONE_PICTURE,
    response_model=schemas.Answer,
    responses=schemas.PICTURE_ERRORS,
)
async def predict(
    request: Request, engine: CurrentEngine, model: ChosenModel, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify a raw picture, sent as the multipart field `file` or as the body."""
    data, filename = await uploads.read_picture(request)
    return JSONResponse(await engine.answer(model, data, filename, top, view))


@app.post(
    "/predict/base64",
    openapi_extra=schemas.body("application/json", schemas.Base64.model_json_schema()),
    response_model=schemas.Answer,
    responses=schemas.PICTURE_ERRORS,
)
async def predict_base64(
    request: Request, engine: CurrentEngine, model: ChosenModel, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify a raw picture, sent in base64."""
    data = await uploads.read_base64(request)
    return JSONResponse(await engine.answer(model, data, None, top, view))


@app.post(
    "/predict/batch",
    openapi_extra=schemas.SEVERAL_PICTURES,
    response_model=schemas.Batch,
    responses=schemas.error_responses(400, 401, 404, 413, 422, 429, 503),
)
async def predict_batch(
    request: Request, engine: CurrentEngine, model: ChosenModel, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify several raw pictures, each sent as the multipart field `files`."""
    files = await uploads.read_pictures(request)
    slots = engine.batcher.slots()

    async def answer(data: bytes, filename: str | None) -> dict[str, Any]:
        try:
            picture = uploads.check(request, data)
            async with slots:
                return await engine.answer(model, picture, filename, top, view)
        except (ApiError, Busy, images.ImageError) as error:
            code = "busy" if isinstance(error, Busy) else error.code
            if isinstance(error, Busy):
                engine.metrics.rejected.labels(error.why).inc()
            content = {"code": code, "message": str(error), "request_id": request.state.request_id}
            return {"filename": filename, "error": content}

    return JSONResponse({"results": await asyncio.gather(*(answer(*file) for file in files))})


@app.post(
    "/feedback",
    status_code=201,
    openapi_extra=schemas.CORRECTION_FORM,
    response_model=schemas.Correction,
    responses=schemas.PICTURE_ERRORS,
)
async def correct(request: Request, engine: CurrentEngine, model: ChosenModel) -> JSONResponse:
    """Keep a picture with its true class, one of the model's, if FEEDBACK_DIR is set."""
    settings = engine.settings
    if settings.feedback_dir is None:
        raise ApiError(404, "not_found", "this server stores no corrections; set FEEDBACK_DIR")
    picture, label = await uploads.read_correction(request)
    if label not in model.record["dataset"]["classes"]:
        problem = f"the label is {quote(label)}" if label else "no label was sent"
        raise bad_request(f"{problem}; it must be a class of {model.name}")
    folder, max_bytes = settings.feedback_dir, settings.feedback_max_bytes
    try:
        await asyncio.to_thread(
            feedback.keep, folder, max_bytes, picture, label, settings.max_pixels
        )
    except feedback.Full as error:
        raise ApiError(413, "full", str(error)) from error
    except OSError as error:
        log.error("not kept", extra={"reason": str(error)})
        message = (
            f"the correction was not kept: {error.strerror} (FEEDBACK_DIR); the log says where"
        )
        raise ApiError(503, "not_kept", message) from error
    return JSONResponse({"label": label}, 201)


# include_router() would build each route again.
app.routes.extend([*open_inference.router.routes, *sagemaker.router.routes])


# --- the page ------------------------------------------------------------------------------------


@app.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(STATIC / "index.html", headers={"Content-Security-Policy": PAGE_POLICY})


app.mount("/static", StaticFiles(directory=STATIC), "static")


startup.collect_garbage()  # after all imports
