"""What every request passes: its id, key, admission, log line and count."""

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

from serve.batching import Busy
from serve.settings import Settings, problems

REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # of a client; anything else gets one of ours
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # the page's parts belong together
]

log = logging.getLogger("serve")


class RequestMiddleware:
    """ASGI middleware around all else; what it refuses is refused before the body is read."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._cors: dict[tuple[str, ...], ASGIApp] = {(): self._admitted}

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
        if scope["method"] == "HEAD":  # uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"")
        request_id = sent if REQUEST_ID.fullmatch(sent) else b"%032x" % random.getrandbits(128)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id), *HEADERS]
            await send(message)

        try:
            await self._inside(state.engine.settings.cors_origins)(scope, receive, answer)
        finally:
            if not scope["state"].get("turned_away"):
                state.engine.release(scope["state"])
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
                self._admitted,
                origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After", "X-Request-ID"],
            )
        return self._cors[origins]

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request that has no key, or comes when the server is busy."""
        engine, post = scope["app"].state.engine, scope["method"] == "POST"
        path, root = scope["path"], scope.get("root_path", "")
        if root and path.startswith(f"{root}/"):  # as the routes see it
            path = path.removeprefix(root)
        if (post or path == "/metrics") and not _has_key(scope, engine.settings.api_keys):
            refusal = problem(scope, 401, "unauthorised", "send one of the keys as X-API-Key")
            await refusal(scope, receive, send)
        elif post and path.startswith(("/predict", "/feedback")):
            try:
                engine.admit()
            except Busy as error:
                await _turn_away(scope, error, send)
                return
            try:
                await self._app(scope, receive, send)
            finally:
                engine.leave()
        else:
            await self._app(scope, receive, send)


def _has_key(scope: Scope, keys: tuple[str, ...]) -> bool:
    """Whether the request has one of the keys; it needs none where there are none."""
    key = dict(scope["headers"]).get(b"x-api-key", b"")
    known = [hmac.compare_digest(key, each.encode()) for each in keys]
    return not keys or any(known)  # all were compared: the time tells nothing


def problem(
    scope: Scope, status: int, code: str, message: str, headers: Any = None
) -> JSONResponse:
    """The one error body."""
    request_id = scope["state"]["request_id"]
    scope["state"]["about"] = {"code": code}
    body = {"error": {"code": code, "message": message, "request_id": request_id}}
    return JSONResponse(body, status, headers)


def busy(scope: Scope, error: Busy) -> JSONResponse:
    """The answer to one that is turned away after it was let in."""
    scope["app"].state.engine.metrics.turned_away.labels(error.why).inc()
    return problem(scope, 429, "busy", str(error), {"Retry-After": str(error.retry_after_s)})


async def _turn_away(scope: Scope, error: Busy, send: Send) -> None:
    """The same at once, to thousands a second: without a Response, and counted by the engine, it
    costs a third.
    """
    state = scope["state"]
    scope["app"].state.engine.turned_away[error.why] += 1
    state["turned_away"] = True
    about = {"code": "busy", "message": str(error), "request_id": state["request_id"]}
    body = json.dumps({"error": about}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"retry-after", b"%d" % error.retry_after_s),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})


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
