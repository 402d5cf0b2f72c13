"""The middleware of every request: its id, key, admission, log line and metrics."""

import hmac
import json
import logging
import random
import re
import sys
import time
from typing import Any

from pydantic import ValidationError
from pythonjsonlogger.json import JsonFormatter
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.admission import Busy
from serve.metrics import MetricsError, shared_folder
from serve.settings import Settings, describe

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # a client's id; anything else is replaced
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # that are counted by name
LIMITED = ("/predict", "/feedback", "/v2/models/", "/invocations")  # POST needs an admission
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # all files of the page must be of one version
]

log = logging.getLogger("serve")


class RequestMiddleware:
    """The outermost ASGI middleware; it rejects a request before the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cors: dict[tuple[str, ...], ASGIApp] = {(): self._check}  # by allowed origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif scope["type"] == "http":
            await self._handle(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            Settings()
            shared_folder()
        except (ValidationError, MetricsError) as error:
            message = describe(error) if isinstance(error, ValidationError) else str(error)
            await receive()
            await send({"type": "lifespan.startup.failed", "message": message})
            return
        await self._app(scope, receive, send)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, engine = time.perf_counter(), scope["app"].state.engine
        if scope["method"] == "HEAD":  # uvicorn omits the body
            scope = {**scope, "method": "GET"}
        scope = _without_slash(scope)
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *HEADERS]
            await send(message)

        try:
            app = self._with_cors(engine.settings.cors_origins)
            await app(scope, receive, send_with_headers)
        finally:
            if not scope["state"].get("rejected"):
                engine.admission.release_body(scope["state"])
                _log(scope, status, time.perf_counter() - start)

    def _with_cors(self, origins: tuple[str, ...]) -> ASGIApp:
        if origins not in self._cors:
            self._cors[origins] = CORSMiddleware(
                self._check,
                origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "X-Request-ID"],
            )
        return self._cors[origins]

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request without a key, or while the server is busy."""
        engine, post = scope["app"].state.engine, scope["method"] == "POST"
        path = _route_path(scope)
        has_key = scope["state"]["has_key"] = _has_key(scope, engine.settings.api_keys)
        if (post or path == "/metrics") and not has_key:
            response = error_response(
                scope, 401, "unauthorised", "send one of the keys as X-API-Key"
            )
            await response(scope, receive, send)
        elif post and path.startswith(LIMITED):
            try:
                engine.admission.admit(engine.batcher)
            except Busy as error:
                await _reject(scope, error, send)
                return
            try:
                await self._app(scope, receive, send)
            finally:
                engine.admission.release()
        else:
            await self._app(scope, receive, send)


def _route_path(scope: Scope) -> str:
    """The path as the routes see it, without the root path."""
    path, root = scope["path"], scope.get("root_path", "")
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path


def _without_slash(scope: Scope) -> Scope:
    """The scope without slashes at the end of its path: a redirect would lose a POST's body."""
    path = scope["path"].rstrip("/")
    if path in (scope["path"], scope.get("root_path", "")):
        return scope
    return {**scope, "path": path}


def _request_id(scope: Scope) -> bytes:
    """The client's, or a new one."""
    sent = dict(scope["headers"]).get(b"x-request-id", b"")
    return sent if REQUEST_ID.fullmatch(sent) else b"%032x" % random.getrandbits(128)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """Count the request in the metrics and write its log line."""
    metrics, state = scope["app"].state.engine.metrics, scope["state"]
    method, route = scope["method"], getattr(scope.get("route"), "path", "other")
    label = method if method in METHODS else "other"  # each label takes memory
    metrics.requests.labels(label, route, status).inc()
    metrics.seconds.labels(route).observe(seconds)
    fields = {"request_id": state["request_id"], "method": method, "path": scope["path"]}
    fields |= {"status": status, "ms": round(seconds * 1000, 2)}
    log.info("request", extra=fields | state.get("log_fields", {}))


def _has_key(scope: Scope, keys: tuple[str, ...]) -> bool:
    """Whether the request has one of the keys; without keys, every request may pass."""
    sent = dict(scope["headers"]).get(b"x-api-key", b"")
    matches = [hmac.compare_digest(sent, key.encode()) for key in keys]
    return not keys or any(matches)  # all keys are compared, so the time reveals nothing


def error_response(
    scope: Scope, status: int, code: str, message: str, headers: Any = None
) -> JSONResponse:
    """The response of every error."""
    scope["state"]["log_fields"] = {"code": code}
    return JSONResponse(_error_body(scope, code, message), status, headers)


def _error_body(scope: Scope, code: str, message: str) -> dict[str, Any]:
    """{"error": {"code", "message", "request_id"}}; Open Inference has a text as `error`."""
    request_id = scope["state"]["request_id"]
    if _route_path(scope).startswith("/v2/"):
        return {"error": message, "code": code, "request_id": request_id}
    return {"error": {"code": code, "message": message, "request_id": request_id}}


def busy_response(scope: Scope, error: Busy) -> JSONResponse:
    """The response to a request that is rejected after its admission."""
    scope["app"].state.engine.metrics.rejected.labels(error.why).inc()
    headers = {"Retry-After": str(error.retry_after_s)}
    return error_response(scope, 429, "busy", str(error), headers)


async def _reject(scope: Scope, error: Busy, send: Send) -> None:
    """Send what busy_response returns, for thousands of requests a second.

    It takes a third of the time: without a Response, and counted in memory.
    """
    state = scope["state"]
    scope["app"].state.engine.admission.count_rejected(error)
    state["rejected"] = True
    body = json.dumps(_error_body(scope, "busy", str(error))).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % error.retry_after_s),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_as_json() -> None:
    """Log a JSON object a line to standard error, and none of uvicorn's access lines."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        formatter = JsonFormatter(
            "{asctime}{levelname}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "message": "event"},
        )
        formatter.converter = time.gmtime  # RFC 3339: servers may be in several time zones
        formatter.default_time_format, formatter.default_msec_format = (
            "%Y-%m-%dT%H:%M:%S",
            "%s.%03dZ",
        )
        handler.setFormatter(formatter)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
