"""The response to each exception that a route raises."""

from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mnist import images, registry
from serve import visibility
from serve.admission import Busy
from serve.errors import ApiError, quote
from serve.middleware import busy_response, error_response

IMAGE_STATUS = {"not_an_image": 415, "too_many_pixels": 413, "blank": 422}


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error_response(request.scope, error.status, error.code, str(error))


async def _image_error(request: Request, error: images.ImageError) -> JSONResponse:
    return error_response(request.scope, IMAGE_STATUS[error.code], error.code, str(error))


async def _busy(request: Request, error: Busy) -> JSONResponse:
    return busy_response(request.scope, error)


async def _registry_error(request: Request, error: registry.RegistryError) -> JSONResponse:
    return error_response(request.scope, 503, "no_model", visibility.reason(request, str(error)))


async def _unknown_model(request: Request, error: registry.UnknownModel) -> JSONResponse:
    name = request.path_params.get("name") or request.query_params.get("model", "")
    message = f"there is no model {quote(name)}; GET /models lists the saved models"
    return error_response(request.scope, 404, "unknown_model", message)


async def _client_disconnected(request: Request, error: ClientDisconnect) -> JSONResponse:
    message = "the client disconnected before the end of the upload"
    return error_response(request.scope, 400, "bad_request", message)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette raises the error again after this response, so that uvicorn logs its traceback."""
    error.add_note(f"request_id {request.state.request_id}")
    return error_response(request.scope, 500, "internal", "the server failed; its log says why")


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    detail = error.errors()[0]
    name, sent = detail["loc"][-1], quote(str(detail.get("input", "")))
    message = f"the parameter `{name}` is {sent}: {detail['msg']}"
    return error_response(request.scope, 400, "bad_request", message)


async def _http_error(request: Request, error: HTTPException) -> Response:
    code, message = "bad_request", str(error.detail)
    if error.status_code == 404 and request.url.path == request.scope.get("root_path"):
        return RedirectResponse(f"{request.url.path}/")  # the page's links are relative to it
    if error.status_code == 404:
        code, message = "not_found", f"nothing is at {quote(request.url.path)}; see GET /docs"
    elif error.status_code == 405:
        message = f"{request.url.path} takes {(error.headers or {}).get('Allow', 'GET')} only"
    return error_response(request.scope, error.status_code, code, message, error.headers)


HANDLERS: Any = {
    ApiError: _api_error,
    images.ImageError: _image_error,
    Busy: _busy,
    registry.RegistryError: _registry_error,
    registry.UnknownModel: _unknown_model,
    ClientDisconnect: _client_disconnected,
    RequestValidationError: _validation_error,
    HTTPException: _http_error,
    Exception: _unexpected_error,
}
