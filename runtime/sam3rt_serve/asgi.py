"""What stands round the endpoints: the key, the log, and answers of their own kind."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .wire import NAME, ErrorAnswer

_LOG = logging.getLogger("sam3rt_serve.requests")
_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A document as an answer."""
    content = msgspec.json.encode(value)
    return Response(content, status, headers, media_type="application/json")


class Keyed:
    """Lets nobody in without the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(given, self._expected):
            await self._app(scope, receive, send)
        else:
            headers = {"www-authenticate": "Bearer"}
            answer = ErrorAnswer("the API key is missing or wrong", "UnauthorizedError")
            await json_response(answer, 401, headers)(scope, receive, send)


class Watched:
    """Counts and logs every request, and gives it an id."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = dict(scope["headers"])
        app = self._app
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # A proxy may have believed the length, and taken the rest for another request.
            answer = ErrorAnswer("a body of a length and of chunks", "ContradictionError")
            app = json_response(answer, 400, {"connection": "close"})
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(NAME, given) else uuid.uuid4().hex
        status = 500

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await app(scope, receive, watched_send)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            # Any other word would be a label of its own.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(route, method, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            fields = {
                "request_id": request_id,
                "client": (scope.get("client") or ("",))[0],
                "method": method,
                "path": scope["path"][:200],
                "status": status,
                "milliseconds": round(seconds * 1e3, 3),
            }
            _LOG.info("request", extra={"fields": fields})


class Download(Response):
    """A large answer, of which few are on their way, each for a limited time."""

    def __init__(self, content: bytes, turn: asyncio.Semaphore, seconds: float) -> None:
        super().__init__(content, media_type="application/octet-stream")
        self._turn = turn
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._turn:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._seconds)
