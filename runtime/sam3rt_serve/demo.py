"""``sam3rt demo``: a page in the browser to click on pictures, on a server of this machine."""

from __future__ import annotations

import argparse
import hashlib
import io
import ipaddress
import json
import socket
import sys
import tarfile
import threading
import warnings
import webbrowser
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import PIL.Image
from msgspec import Meta, Struct

from sam3rt.cli.options import add_model_options, load_from_options
from sam3rt.errors import BackendError, InvalidInputError, PromptWarning
from sam3rt.results import Segmentation

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sam3rt.bundle import Bundle

HELP = "click on pictures in the browser (needs the demo extra)"
DESCRIPTION = """\
Open a page in the browser: drop a picture, click on objects, download their masks.

Everything runs on this machine and needs no network. Only this machine can reach the page, unless
--host names another of its addresses, such as one that a phone in the same network reaches.
"""
PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
}
# ONNX Runtime for browsers is 14 MB that most people do not need, so they bring it themselves.
_WEB_VERSION = "1.30.0"
_WEB_SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
_WEB_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
_WEB_HINT = (
    f"To have this, get “npm pack onnxruntime-web@{_WEB_VERSION}” and start “sam3rt demo "
    f"--onnxruntime-web onnxruntime-web-{_WEB_VERSION}.tgz”."
)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="model (default: the bundled MobileSAM)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address of this machine to listen on (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=0, help="port (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the browser")
    parser.add_argument(
        "--onnxruntime-web",
        type=Path,
        metavar="FILE",
        help="let the page decode too, by this package from npm: "
        f"onnxruntime-web-{_WEB_VERSION}.tgz, from `npm pack onnxruntime-web@{_WEB_VERSION}`",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Serve the page until the user interrupts it."""
    try:
        import uvicorn

        from .core import Service
        from .http import create_app
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        raise BackendError(f"the demo needs {missing}: pip install 'sam3rt[demo,cpu]'") from error
    web = {} if options.onnxruntime_web is None else read_onnxruntime_web(options.onnxruntime_web)
    # Before the model is loaded: an address that is taken shows at once.
    listener = _listen(options.host, options.port)
    # Clicks far outside a picture are the user's affair.
    warnings.filterwarnings("ignore", category=PromptWarning)
    model = load_from_options(options)
    model.warm_up()
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}/"
    hosts = {f"{name}:{port}"}
    if ipaddress.ip_address(host).is_loopback:
        hosts.add(f"localhost:{port}")
    else:
        print("Anybody in this network can use the page.", file=sys.stderr)
    app = Guard(create_app(Service(model), routes=page_routes(model.bundle, web)), hosts)
    print(f"{url} (Ctrl-C ends it)", flush=True)
    if not options.no_browser:
        # Some browsers let the call wait until they end.
        threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()
    server = uvicorn.Server(
        uvicorn.Config(
            app, http="h11", log_level="warning", server_header=False, timeout_graceful_shutdown=5
        )
    )
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections at an address of this machine.

    Raises:
        InvalidInputError: the address is not one, or stands for all of the machine's.
        OSError: it is another machine's, or the port is taken.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        address = None
    if address is None or address.is_unspecified:
        raise InvalidInputError("--host", repr(host), "one address of this machine in numbers")
    if not 0 <= port < 1 << 16:
        raise InvalidInputError("--port", str(port), "a number from 0 to 65535")
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(address), port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {address}, port {port}: {error.strerror}") from error
    return listener


def read_onnxruntime_web(path: Path) -> dict[str, bytes]:
    """The files that the page needs of the npm package onnxruntime-web, by name.

    Raises:
        InvalidInputError: it is another file than the registry's.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if hashlib.sha512(content).hexdigest() != _WEB_SHA512:
        expected = f"onnxruntime-web-{_WEB_VERSION}.tgz as the npm registry has it"
        raise InvalidInputError("--onnxruntime-web", str(path), expected)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {name: archive.extractfile(f"package/dist/{name}") for name in _WEB_FILES}
        return {name: file.read() for name, file in files.items() if file is not None}


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
            from .asgi import json_response
            from .wire import ErrorAnswer

            answer = json_response(ErrorAnswer(refused, "ForbiddenError"), 403)
            await answer(scope, receive, guarded_send)


def page_routes(bundle: Bundle, onnxruntime_web: Mapping[str, bytes]) -> list[BaseRoute]:
    """The page, what its own decoder needs, and its downloads.

    Args:
        bundle: whose decoder the page may run.
        onnxruntime_web: from :func:`read_onnxruntime_web`; empty where the page cannot decode.
    """
    from starlette.exceptions import HTTPException
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route

    files = {path.name: path for path in PAGE.iterdir() if path.suffix in _MEDIA_TYPES}
    decoder = bundle.manifest.decoder
    graphs = {entry.file: bundle.file(entry) for entry in (decoder.model, *decoder.external_data)}
    manifest = json.loads(msgspec.json.encode(bundle.manifest))
    facts = {"manifest": manifest, "onnxruntime_web": bool(onnxruntime_web), "hint": _WEB_HINT}

    def media_type(name: str) -> str:
        return _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")

    # A server that was started anew may be of another version: nothing is taken from a cache
    # without asking.
    fresh = {"cache-control": "no-cache"}

    def file_of(known: Mapping[str, Path], name: str) -> Response:
        if name not in known:
            raise HTTPException(404, "there is no such file")
        return FileResponse(known[name], media_type=media_type(name), headers=fresh)

    async def get_index(request: Request) -> Response:
        return file_of(files, "index.html")

    async def get_file(request: Request) -> Response:
        return file_of(files, request.path_params["name"])

    async def get_graph(request: Request) -> Response:
        return file_of(graphs, request.path_params["name"])

    async def get_web(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in onnxruntime_web:
            raise HTTPException(404, _WEB_HINT)
        return Response(onnxruntime_web[name], media_type=media_type(name), headers=fresh)

    async def get_facts(request: Request) -> Response:
        return Response(json.dumps(facts), media_type="application/json", headers=fresh)

    return [
        Route("/", get_index),
        Route("/page/facts.json", get_facts),
        Route("/page/export", post_export, methods=["POST"]),
        Route("/page/decoder/{name}", get_graph),
        Route("/page/onnxruntime/{name}", get_web),
        Route("/page/{name}", get_file),
    ]


class ExportObject(Struct, forbid_unknown_fields=True):
    """One object's mask: base64 of height * width bits, row by row, a byte's highest bit first."""

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
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.responses import Response

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
            {"object": number, "score": round(one.score, 6), "polygons": [r.tolist() for r in rings]}
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
    shape = (question.height, question.width)
    pixels = shape[0] * shape[1]
    if pixels * len(question.objects) > _MOST_PIXELS:
        raise InvalidInputError("objects", "too many pixels", f"at most {_MOST_PIXELS} together")
    masks = np.empty((len(question.objects), *shape), np.bool_)
    for mask, one in zip(masks, question.objects, strict=True):
        if len(one.mask) != -(-pixels // 8):
            expected = f"{-(-pixels // 8)} for {shape[1]} x {shape[0]} pixels"
            raise InvalidInputError("mask", f"{len(one.mask)} bytes", expected)
        bits = np.unpackbits(np.frombuffer(one.mask, np.uint8), count=pixels)
        mask[:] = bits.reshape(shape)
    return Segmentation(
        masks,
        shape,
        np.array([one.score for one in question.objects], np.float32),
        np.array([one.number for one in question.objects], np.int64),
    )


def _json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _png(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> bytes:
    stream = io.BytesIO()
    PIL.Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(stream, "PNG")
    return stream.getvalue()
