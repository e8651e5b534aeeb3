"""What ``sam3rt demo`` adds to the server: the page, its downloads, and who may use it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import PIL.Image
from msgspec import Meta, Struct
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam3rt.bundle import Bundle
from sam3rt.errors import InvalidInputError
from sam3rt.results import Segmentation

from .asgi import json_response
from .wire import ErrorAnswer

PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
# Scripts, styles and data come from the server alone; pictures that were dropped are blobs.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; "
    "style-src 'self'; img-src 'self' blob:; connect-src 'self'; worker-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # With these three, a browser gives the page's decoder more than one thread.
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-resource-policy": "same-origin",
}
_MOST_PIXELS = 1 << 28  # of all masks of an export together
_TOLERANCE = 1.0  # of polygons, pixels


class Guard:
    """Lets the page alone use the server, by the headers that browsers send.

    Requests with another ``Host`` come from a page whose name was pointed at this machine, those
    with another ``Origin`` from another page. Every answer carries the headers that bound what the
    page may load.

    Args:
        app: what it guards.
        hosts: the server's own names with the port, as browsers write them.
    """

    def __init__(self, app: ASGIApp, hosts: set[str]) -> None:
        self._app = app
        self._hosts = {host.encode() for host in hosts}
        self._headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = dict(scope["headers"])
            host, origin = headers.get(b"host", b""), headers.get(b"origin")
            if host not in self._hosts:
                refused = "this server answers to its own address alone"
            elif origin is not None and origin != b"http://" + host:
                refused = "this server answers to its own page alone"
            else:
                await self._app(scope, receive, guarded_send)
                return
            answer = json_response(ErrorAnswer(refused, "ForbiddenError"), 403)
            await answer(scope, receive, guarded_send)


def page_routes(bundle: Bundle, onnxruntime_web: Mapping[str, bytes]) -> list[BaseRoute]:
    """The page, what its own decoder needs, and its downloads.

    Args:
        bundle: whose decoder the page may run.
        onnxruntime_web: ONNX Runtime for browsers, by file name; empty where the page cannot
            decode.
    """
    decoder = bundle.manifest.decoder
    manifest = json.loads(msgspec.json.encode(bundle.manifest))
    facts = {"manifest": manifest, "onnxruntime_web": bool(onnxruntime_web)}
    files: dict[str, Path | bytes] = {
        **{path.name: path for path in PAGE.iterdir() if path.suffix in _MEDIA_TYPES},
        "facts.json": _json(facts),
        **{f"decoder/{e.file}": bundle.file(e) for e in (decoder.model, *decoder.external_data)},
        **{f"onnxruntime/{name}": content for name, content in onnxruntime_web.items()},
    }

    async def get_file(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        file = files.get(name)
        if file is None:
            raise HTTPException(404, "there is no such file")
        media_type = _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
        # A server that was started anew may be of another version: nothing is taken from a cache
        # without asking.
        fresh = {"cache-control": "no-cache"}
        if isinstance(file, Path):
            return FileResponse(file, headers=fresh, media_type=media_type)
        return Response(file, headers=fresh, media_type=media_type)

    return [
        Route("/", get_file),
        Route("/page/export", post_export, methods=["POST"]),
        Route("/page/{name:path}", get_file),
    ]


class ExportObject(Struct, forbid_unknown_fields=True):
    """One object's mask: base64 of its rows, eight pixels a byte, the highest bit first."""

    number: Annotated[int, Meta(ge=1, le=1 << 31)]
    score: float
    mask: bytes


class ExportQuestion(Struct, forbid_unknown_fields=True):
    """Masks of an image, and the kind of file to make of them."""

    format: Literal["png", "coco", "polygons"]
    file_name: Annotated[str, Meta(max_length=1024)]
    height: Annotated[int, Meta(ge=1)]
    width: Annotated[int, Meta(ge=1)]
    objects: Annotated[list[ExportObject], Meta(min_length=1, max_length=1024)]


async def post_export(request: Request) -> Response:
    """Write the masks that the page shows, wherever they were decoded."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_PIXELS // 6 + (1 << 20):
            raise HTTPException(413, "more masks than can be written together")
    try:
        question = msgspec.json.decode(body, type=ExportQuestion)
        content, media_type = await run_in_threadpool(export, question)
    except (msgspec.DecodeError, InvalidInputError) as error:
        raise HTTPException(400, str(error)) from error
    return Response(content, media_type=media_type)


def export(question: ExportQuestion) -> tuple[bytes, str]:
    """A file of masks, and its media type.

    PNG: 8 bits a pixel, 255 inside; of several objects a ZIP archive of one each. COCO: see
    :meth:`Segmentation.to_coco`. Polygons: outlines [[x, y], ...] of each object in pixels, which
    leave the pixels' edges by at most a pixel; those of holes run the other way.

    Raises:
        InvalidInputError: masks of another size than the image's, or of too many pixels.
    """
    found = _segmentation(question)
    numbers: list[int] = found.objects.tolist()
    if question.format == "coco":
        return _json(found.to_coco(question.file_name)), "application/json"
    if question.format == "polygons":
        objects = [
            {
                "object": number,
                "score": round(one.score, 6),
                "polygons": [r.tolist() for r in rings],
            }
            for number, one, rings in zip(
                numbers, question.objects, found.polygons(_TOLERANCE, holes=True), strict=True
            )
        ]
        size = {"height": question.height, "width": question.width}
        return _json({"file_name": question.file_name, **size, "objects": objects}), (
            "application/json"
        )
    pictures = [_png(mask) for mask in found.masks]
    if len(pictures) == 1:
        return pictures[0], "image/png"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number, picture in zip(numbers, pictures, strict=True):
            archive.writestr(f"object-{number}.png", picture)
    return stream.getvalue(), "application/zip"


def _segmentation(question: ExportQuestion) -> Segmentation:
    height, width = shape = (question.height, question.width)
    if height * width * len(question.objects) > _MOST_PIXELS:
        raise InvalidInputError("objects", "too many pixels", f"at most {_MOST_PIXELS} together")
    length = -(-width // 8)
    masks = np.empty((len(question.objects), *shape), np.bool_)
    for mask, one in zip(masks, question.objects, strict=True):
        if len(one.mask) != height * length:
            expected = f"{height * length} for {width} x {height} pixels"
            raise InvalidInputError("mask", f"{len(one.mask)} bytes", expected)
        rows = np.frombuffer(one.mask, np.uint8).reshape(height, length)
        mask[:] = np.unpackbits(rows, axis=1, count=width)
    return Segmentation(
        masks,
        shape,
        np.array([one.score for one in question.objects], np.float32),
        np.array([one.number for one in question.objects], np.int64),
    )


def _json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _png(mask: NDArray[np.bool_]) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(stream, "PNG")
    return stream.getvalue()
