"""The routes that SageMaker calls in a container that hosts a model.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from mnist import registry
from serve import schemas, uploads
from serve.dependencies import ChosenModel, CurrentEngine, Top, View

router = APIRouter(tags=["SageMaker"])


@router.get("/ping", responses=schemas.error_responses(503))
async def ping(engine: CurrentEngine) -> dict[str, str]:
    """Whether a model answers."""
    if engine.current is None:
        raise registry.RegistryError(engine.reason)
    return {"status": "ready"}


@router.post(
    "/invocations",
    openapi_extra=schemas.INVOCATION,
    response_model=schemas.Answer,
    responses=schemas.PICTURE_ERRORS,
)
async def invocations(
    request: Request, engine: CurrentEngine, model: ChosenModel, top: Top = 3, view: View = False
) -> JSONResponse:
    """Classify a raw picture, sent as to /predict or, in JSON, as to /predict/base64."""
    filename = None
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        data = await uploads.read_base64(request)
    else:
        data, filename = await uploads.read_picture(request)
    return JSONResponse(await engine.answer(model, data, filename, top, view))
