"""What every request passes: its id, key, admission, log line and count."""

import hmac
import logging
import re
import sys
import time
import uuid
from typing import Any

from pydantic import ValidationError
from pythonjsonlogger.json import JsonFormatter
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.batches import Busy
from serve.settings import Settings, problems

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # of a client; anything else gets one of ours
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]

log = logging.getLogger("serve")


class Front:
    """ASGI middleware around all routes; what it refuses is refused before the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cors: dict[tuple[str, ...], ASGIApp] = {(): app}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._start(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _start(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            Settings()
        except ValidationError as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": problems(error)})
            return
        await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, state = time.perf_counter(), scope["app"].state
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"")
        request_id = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *HEADERS]
            await send(message)

        try:
            settings: Settings = state.engine.settings
            app = self._refusal(scope, headers, settings) or self._inside(settings.cors_origins)
            await app(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - start
            method, route = scope["method"], getattr(scope.get("route"), "path", "other")
            state.engine.metrics.requests.labels(method, route, status).inc()
            state.engine.metrics.seconds.labels(route).observe(seconds)
            about = {"request_id": request_id.decode(), "method": method, "path": scope["path"]}
            about |= {"status": status, "ms": round(seconds * 1000, 2)}
            log.info("request", extra=about | scope["state"].get("about", {}))

    def _inside(self, origins: tuple[str, ...]) -> ASGIApp:
        if origins not in self._cors:
            self._cors[origins] = CORSMiddleware(
                self._app, origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        return self._cors[origins]

    def _refusal(
        self, scope: Scope, headers: dict[bytes, bytes], settings: Settings
    ) -> JSONResponse | None:
        """What a request gets that has no key, or comes when the server is busy."""
        post = scope["method"] == "POST"
        if settings.api_keys and (post or scope["path"] == "/metrics"):
            key = headers.get(b"x-api-key", b"")
            known = [hmac.compare_digest(key, each.encode()) for each in settings.api_keys]
            if not any(known):  # all were compared: the time tells nothing
                return problem(scope, 401, "unauthorised", "send one of the keys as X-API-Key")
        if post and scope["path"].startswith("/predict"):
            try:
                scope["app"].state.engine.admit()
            except Busy as error:
                return busy(scope, error)
        return None


def problem(
    scope: Scope, status: int, code: str, message: str, headers: Any = None
) -> JSONResponse:
    """The one error body."""
    request_id = scope["state"]["request_id"]
    scope["state"]["about"] = {"code": code}
    body = {"error": {"code": code, "message": message, "request_id": request_id}}
    return JSONResponse(body, status, headers)


def busy(scope: Scope, error: Busy) -> JSONResponse:
    return problem(scope, 429, "busy", str(error), {"Retry-After": str(error.retry_after_s)})


def log_as_json() -> None:
    """One JSON object a line on standard error, in place of uvicorn's line for each request."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(
            JsonFormatter(
                "{asctime}{levelname}{message}",
                style="{",
                rename_fields={"asctime": "time", "levelname": "level", "message": "event"},
            )
        )
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
