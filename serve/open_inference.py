"""The routes of the Open Inference Protocol, version 2, which KServe and Triton speak, too."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from mnist import registry
from serve import schemas, uploads
from serve.dependencies import CURRENT, CurrentEngine, NamedModel

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])


@router.get("")
async def server(request: Request) -> dict[str, Any]:
    """The name, version and extensions of the server."""
    api = request.app
    return {"name": api.title, "version": api.version, "extensions": ["binary_tensor_data"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Whether the process is alive."""
    return {"live": True}


@router.get("/health/ready", response_model=dict[str, bool], responses={503: {}})
async def ready(engine: CurrentEngine) -> JSONResponse:
    """Whether a model answers."""
    is_ready = engine.current is not None
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


def _record(request: Request, engine: CurrentEngine) -> tuple[str, registry.Record]:
    """The name and record of the path's model."""
    name = request.path_params["name"]
    if name != CURRENT:
        return registry.record(engine.folder, name)
    if engine.current is None:
        raise registry.RegistryError(engine.reason)
    return engine.current.name, engine.current.record


@router.get(
    "/models/{name}",
    openapi_extra=schemas.NAME_PARAMETER,
    responses={
        status: {"model": schemas.ErrorText, "description": schemas.CODES[status]}
        for status in (404, 503)
    },
)
def model(request: Request, engine: CurrentEngine) -> dict[str, Any]:
    """The inputs and outputs of a model; `current` is the current one."""
    from serve import tensors  # most servers get no tensors, and start 5 ms faster without it

    name, record = _record(request, engine)
    platform = "onnxruntime_onnx" if "onnx" in record["files"] else "pytorch"
    outputs = tensors.describe_outputs(record)
    return {"name": name, "platform": platform, "inputs": [tensors.INPUT], "outputs": outputs}


@router.get(
    "/models/{name}/ready",
    openapi_extra=schemas.NAME_PARAMETER,
    responses=schemas.error_responses(404, 503, model=schemas.ErrorText),
)
def model_ready(request: Request, engine: CurrentEngine) -> dict[str, Any]:
    """Whether a model can answer; others than the current one are loaded with a request."""
    return {"name": _record(request, engine)[0], "ready": True}


@router.post(
    "/models/{name}/infer",
    openapi_extra=schemas.INFERENCE | schemas.NAME_PARAMETER,
    response_model=dict[str, Any],
    responses=schemas.error_responses(
        400, 401, 404, 413, 415, 422, 429, 503, model=schemas.ErrorText
    ),
)
async def infer(request: Request, engine: CurrentEngine, model: NamedModel) -> Response:
    """Classify raw pictures, the elements of the input `image`."""
    from serve import tensors  # as above

    body, max_files = await uploads.read_tensors(request)
    header = request.headers.get(tensors.HEADER)
    infer_request = await asyncio.to_thread(tensors.parse, body, header, max_files)
    slots = engine.batcher.slots()

    async def answer(data: bytes) -> dict[str, Any]:
        picture = uploads.check(request, data, "as an element of `image`")
        async with slots:
            return await engine.answer(model, picture, None)

    answers = await asyncio.gather(*map(answer, infer_request.pictures), return_exceptions=True)
    for result in answers:
        if isinstance(result, BaseException):
            raise result
    return tensors.respond(infer_request, model.name, model.record, answers)  # type: ignore[arg-type]
