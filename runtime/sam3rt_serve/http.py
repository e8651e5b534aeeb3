"""The service over HTTP: an ASGI application on Starlette.

The core does the work on threads of its own; the event loop only reads, waits and writes. No path
or address that a caller sends is ever opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message

from sam3rt import __version__
from sam3rt.accuracy.gate import Health
from sam3rt.embedding_cache import CacheFullError
from sam3rt.errors import InvalidInputError, Sam3rtError

from .asgi import Download, Keyed, Watched, json_response
from .core import ObjectMasks, Service, StoredImage
from .errors import BusyError, DeadlineError, TooLargeError, UnknownImageError
from .metrics import Metrics
from .wire import (
    JSON_BYTES,
    NAME,
    OPERATIONS,
    ErrorAnswer,
    HealthAnswer,
    ImageAnswer,
    MasksAnswer,
    MasksQuestion,
    ModelAnswer,
    object_answer,
    openapi,
)

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
# The first class that fits.
_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (UnknownImageError, 404),
    (TooLargeError, 413),
    (BusyError, 429),
    (CacheFullError, 429),
    (DeadlineError, 504),
    (msgspec.DecodeError, 400),
    (ClientDisconnect, 499),  # nobody reads it; the number is nginx's, for the logs
    (InvalidInputError, 400),
    (Exception, 500),
)
_EXPECTED = (Sam3rtError, msgspec.DecodeError, HTTPException, ClientDisconnect)
# Bodies that lie in memory at the same time, in bodies of the largest size.
_BODIES = 8
# Embedding files on their way at the same time.
_DOWNLOADS = 4


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    health_seconds: float = 300.0,
    routes: Sequence[BaseRoute] = (),
) -> ASGIApp:
    """The application. It closes the service when it shuts down.

    Args:
        service: what it offers.
        api_key: asked for as ``Authorization: Bearer KEY`` by all but ``/livez``, ``/readyz`` and
            the further routes; ``None`` asks for none.
        health_seconds: how long a health check's answer holds; a check costs one encoder run.
        routes: further ones, such as a page's, which need no key.
    """
    api = _Api(service, api_key is not None, health_seconds)
    own = [
        Route(operation.path, getattr(api, operation.name), methods=[operation.method])
        for operation in OPERATIONS
    ]
    for route, operation in zip(own, OPERATIONS, strict=True):
        if api_key is not None and not operation.is_public:
            route.app = Keyed(route.app, api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = Starlette(
        routes=[*own, *routes],
        # Those that nobody expects are logged with their traceback as well.
        exception_handlers=dict.fromkeys((*_EXPECTED, Exception), api.on_error),
        lifespan=lifespan,
    )
    # A redirect's address would be made of the Host header, which a caller writes.
    app.router.redirect_slashes = False
    # Not as a middleware: Starlette answers what nobody expects outside of those.
    return Watched(app, api.metrics)


class _Api:
    """The endpoints."""

    def __init__(self, service: Service, has_key: bool, health_seconds: float) -> None:
        self._service = service
        self._limits = service.limits
        self._has_key = has_key
        self.metrics = Metrics(service)
        self._body_bytes = 0
        self._downloads = asyncio.Semaphore(_DOWNLOADS)
        self._health_seconds = health_seconds
        self._health: asyncio.Task[Health] | None = None
        self._health_until = 0.0

    # --- images -----------------------------------------------------------------------------------

    async def post_image(self, request: Request) -> Response:
        return await self._store(request, None)

    async def put_image(self, request: Request) -> Response:
        return await self._store(request, _image_id(request))

    async def get_image(self, request: Request) -> Response:
        start = time.perf_counter()
        found = await asyncio.to_thread(self._service.find_image, _image_id(request))
        return _image_answer(found, start)

    async def delete_image(self, request: Request) -> Response:
        await asyncio.to_thread(self._service.remove_image, _image_id(request))
        return Response(status_code=204)

    async def get_embedding(self, request: Request) -> Response:
        image_id = _image_id(request)
        if self._downloads.locked():
            raise BusyError(f"{_DOWNLOADS} embeddings are on their way, the most that may be")
        async with self._downloads:
            content = await asyncio.to_thread(self._service.embedding_file, image_id)
        return Download(content, self._downloads, self._limits.seconds)

    async def _store(self, request: Request, image_id: str | None) -> Response:
        start, deadline = time.perf_counter(), time.monotonic() + self._limits.seconds
        kind = _media_type(request)
        if not (kind.startswith("image/") or kind == "multipart/form-data"):
            raise HTTPException(415, "image/jpeg, image/png or multipart/form-data is expected")
        is_form = kind == "multipart/form-data"
        # A form has a few lines round its file.
        most = self._limits.image_bytes + (1 << 16 if is_form else 0)
        async with self._body(request, most) as body:
            content = await _form_image(request, body) if is_form else body
            # On a thread, as it hashes the file.
            future = await asyncio.to_thread(
                self._service.add_image, content, image_id, deadline=deadline
            )
            stored = await self._wait(request, future, deadline)
        return _image_answer(stored, start)

    # --- masks ------------------------------------------------------------------------------------

    async def post_masks(self, request: Request) -> Response:
        start, deadline = time.perf_counter(), time.monotonic() + self._limits.seconds
        if _media_type(request) != "application/json":
            raise HTTPException(415, "application/json is expected")
        async with self._body(request, JSON_BYTES) as body:
            try:
                question = msgspec.json.decode(body, type=MasksQuestion)
            except UnicodeDecodeError as error:
                raise msgspec.DecodeError("JSON is not in UTF-8") from error

        def finish(found: list[ObjectMasks]) -> bytes:
            objects = [object_answer(one, question) for one in found]
            height, width = found[0].masks.shape[1:]
            took = _milliseconds(start)
            return msgspec.json.encode(MasksAnswer(objects, height, width, question.format, took))

        future = self._service.segment(
            _image_id(request),
            question.objects,
            question.multimask,
            session=question.session,
            finish=finish,
            deadline=deadline,
        )
        content = await self._wait(request, future, deadline)
        return Response(content, media_type="application/json")

    # --- the service ------------------------------------------------------------------------------

    async def get_model(self, request: Request) -> Response:
        model = self._service.model
        manifest, limits = model.manifest, self._limits
        return json_response(
            ModelAnswer(
                manifest.name,
                manifest.model_type,
                list(manifest.image.size),
                list(manifest.masks.low_res_size),
                model.score_unit,
                manifest.fingerprint,
                model.backend.name,
                model.device,
                model.backend.precision,
                __version__,
                {
                    name: getattr(limits, name)
                    for name in ("image_bytes", "pixels", "objects", "points", "mask_pixels")
                },
            )
        )

    async def get_livez(self, request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def get_readyz(self, request: Request) -> Response:
        """Ask the model, or repeat what it answered not long ago."""
        if self._health is None or (self._health.done() and time.monotonic() >= self._health_until):
            self._health = asyncio.create_task(self._ask_health())
        done, _ = await asyncio.wait({self._health}, timeout=self._limits.seconds)
        if not done:
            return json_response(HealthAnswer(False, "the model has not answered yet"), 503)
        health = self._health.result()
        answer = HealthAnswer(
            health.healthy, health.problem, health.encode_seconds, health.decode_seconds
        )
        return json_response(answer, 200 if health.healthy else 503)

    async def _ask_health(self) -> Health:
        health = await asyncio.to_thread(self._service.model.health)
        if not health.healthy:
            _LOG.error("the model is not well: %s", health.problem)
        # A model that is not well is asked again at once.
        self._health_until = time.monotonic() + self._health_seconds * health.healthy
        return health

    async def get_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=1.0.0")

    async def get_openapi(self, request: Request) -> Response:
        return json_response(openapi(self._has_key))

    # --- what they share --------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """A request's body, counted for as long as the block lasts.

        Raises:
            TooLargeError: it is longer than ``most``.
            BusyError: too much of other bodies is in memory.
            HTTPException: it does not come within the time that a request has.
        """
        held = 0

        async def read() -> bytes:
            nonlocal held
            parts = []
            async for part in request.stream():
                held += len(part)
                self._body_bytes += len(part)
                if held > most:
                    raise TooLargeError(f"a body of more than {most} bytes")
                if self._body_bytes > _BODIES * max(self._limits.image_bytes, JSON_BYTES):
                    raise BusyError("too many large bodies are being received")
                parts.append(part)
            return b"".join(parts)

        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise TooLargeError(f"a body of {declared} bytes, at most {most} are taken")
        try:
            try:
                with anyio.fail_after(self._limits.seconds):
                    body = await read()
            except TimeoutError:
                raise HTTPException(408, "the body came too slowly") from None
            yield body
        finally:
            self._body_bytes -= held

    async def _wait(self, request: Request, future: Future[T], deadline: float) -> T:
        """What a future brings, unless the time is over or the caller hangs up before.

        Raises:
            DeadlineError: the time is over.
            ClientDisconnect: the caller hung up.
        """
        answer = asyncio.wrap_future(future)
        gone = asyncio.ensure_future(_hung_up(request))
        try:
            either: set[asyncio.Future[Any]] = {answer, gone}
            await asyncio.wait(
                either,
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientDisconnect
            raise DeadlineError(f"no answer within {self._limits.seconds:g} s")
        finally:
            gone.cancel()
            answer.cancel()  # takes what still waits out of its queue

    def on_error(self, request: Request, error: Exception) -> Response:
        """Say what is wrong in the form that every error has."""
        kind, headers, text = type(error).__name__, {}, str(error)
        if isinstance(error, HTTPException):
            status, text, headers = error.status_code, error.detail, dict(error.headers or {})
        else:
            status = next(status for known, status in _STATUS if isinstance(error, known))
        if status == 429:
            headers["retry-after"] = "1"
        if status == 500:
            _LOG.error("%s: %s", kind, error)
        self.metrics.errors.labels(kind).inc()
        return json_response(ErrorAnswer(text, kind), status, headers)


def _image_id(request: Request) -> str:
    image_id: str = request.path_params["image_id"]
    if not re.fullmatch(NAME, image_id):
        raise UnknownImageError("an image id is up to 128 letters, digits, dots, dashes or _")
    return image_id


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _form_image(request: Request, body: bytes) -> bytes:
    """The field ``image`` of a form. The file's name in it plays no part."""

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    form = await Request(request.scope, replay).form(max_files=1, max_fields=8)
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise HTTPException(400, "the form has no file in a field named image")
        return await image.read()
    finally:
        await form.close()


async def _hung_up(request: Request) -> None:
    """Return when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _image_answer(stored: StoredImage, start: float) -> Response:
    height, width = stored.size
    took = _milliseconds(start)
    return json_response(ImageAnswer(stored.image_id, height, width, not stored.is_new, took))


def _milliseconds(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 3)
