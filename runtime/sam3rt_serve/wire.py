"""What crosses the wire: requests, answers, forms of masks, and the OpenAPI document."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from sam3rt import __version__
from sam3rt.masks.polygons import outlines, signed_area
from sam3rt.masks.rle import compress, runs_of

from .core import ObjectMasks, ObjectPrompt

# A caller's own image ids and session names.
NAME = r"^[A-Za-z0-9._-]{1,128}$"
# More than the largest request for masks that the default limits allow.
JSON_BYTES = 4 << 20
_TOLERANCE = "how far polygons may leave the pixels' edges to have fewer points, pixels"


class MasksQuestion(Struct, forbid_unknown_fields=True):
    """A request for masks of one image's objects."""

    objects: Annotated[list[ObjectPrompt], Meta(min_length=1)]
    multimask: bool = True
    format: Literal["png", "rle", "polygons", "bits"] = "png"
    tolerance: Annotated[float, Meta(ge=0, le=100, description=_TOLERANCE)] = 0.0
    session: Annotated[str, Meta(pattern=NAME)] | None = None


class ImageAnswer(Struct):
    """An image that is ready for clicks. ``cached``: it was so before this request."""

    image_id: str
    height: int
    width: int
    cached: bool
    milliseconds: float


class RleMask(Struct):
    """A mask as COCO's compressed run lengths; size is [height, width]."""

    size: list[int]
    counts: str


class ObjectAnswer(Struct):
    """Masks of one object, their scores and boxes.

    ``png``: base64 of a 1-bit PNG. ``bits``: base64 of height * width bits, row by row, the
    highest bit of a byte first. ``rle``: as COCO has them. ``polygons``: a list of outlines
    [x, y, x, y, ...] without those of holes, the largest first. A box is [x0, y0, x1, y1], x1 and
    y1 just outside, or null for an empty mask. ``refined``: the session's earlier mask of this
    object was a prompt too.
    """

    masks: list[str | RleMask | list[list[float]]]
    scores: list[float]
    boxes: list[list[int] | None]
    refined: bool


class MasksAnswer(Struct):
    """Masks of each object, in the order of the request; height and width are the image's."""

    objects: list[ObjectAnswer]
    height: int
    width: int
    format: str
    milliseconds: float


class ModelAnswer(Struct):
    """What is served. Sizes are [height, width]; limits are those of one request.

    ``score_unit``: scores are predicted IoUs (``iou``) or their log-odds (``log_odds``, SAM 3.1).
    """

    name: str
    family: str
    image_size: list[int]
    low_res_mask_size: list[int]
    score_unit: str
    fingerprint: str
    backend: str
    device: str
    precision: str
    version: str
    limits: dict[str, float]


class HealthAnswer(Struct):
    """Whether the model answered a question whose answer is known."""

    ready: bool
    problem: str
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0


class ErrorAnswer(Struct):
    """Why there is no answer. ``kind`` is stable, ``error`` is for people."""

    error: str
    kind: str


def _png(mask: NDArray[np.bool_], bits: NDArray[np.uint8]) -> str:
    """Without Pillow, which tries all filters on every row: eight times as slow and no smaller."""
    height, width = mask.shape
    rows = np.pad(bits, ((0, 0), (1, 0)))  # a row begins with its filter, 0 for none
    packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", packer.compress(rows.data) + packer.flush()),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return base64.b64encode(content).decode()


def _form(mask: NDArray[np.bool_], bits: NDArray[np.uint8], question: MasksQuestion) -> Any:
    if question.format == "png":
        return _png(mask, bits)
    if question.format == "bits":
        whole = bits if mask.shape[1] % 8 == 0 else np.packbits(mask)
        return base64.b64encode(whole.tobytes()).decode()
    if question.format == "rle":
        return RleMask(list(mask.shape), compress(runs_of(mask)))
    rings = outlines(mask, question.tolerance)
    return [ring.ravel().tolist() for ring in rings if signed_area(ring) > 0]


def _box(bits: NDArray[np.uint8]) -> list[int] | None:
    """Around a mask, out of its rows as bits, which are an eighth of it to read."""
    rows = np.flatnonzero(bits.any(axis=1))
    if not len(rows):
        return None
    columns = np.flatnonzero(np.unpackbits(np.bitwise_or.reduce(bits, axis=0)))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def object_answer(found: ObjectMasks, question: MasksQuestion) -> ObjectAnswer:
    """One object's masks as they are sent."""
    packed = [np.packbits(mask, axis=1) for mask in found.masks]
    return ObjectAnswer(
        [_form(mask, bits, question) for mask, bits in zip(found.masks, packed, strict=True)],
        found.scores.tolist(),
        [_box(bits) for bits in packed],
        found.is_refined,
    )


class Operation(NamedTuple):
    """One endpoint: what routes requests to it, and what describes it.

    Attributes:
        method: of HTTP.
        path: with ``{image_id}`` where it names an image.
        name: of the method that answers.
        summary: for people.
        answer: what comes with status 200: a type of JSON document or a media type; ``None``
            where the status is 204 and nothing comes.
        errors: statuses of errors.
        takes: ``"image"``, ``"prompts"`` or nothing.
        is_public: whether it is open without the API key.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: type[Struct] | str | None
    errors: tuple[int, ...] = ()
    takes: str = ""
    is_public: bool = False


_IMAGE = "/v1/images/{image_id}"
_WORK = (400, 408, 413, 415, 429, 500, 504)
OPERATIONS = (
    Operation(
        *("POST", "/v1/images", "post_image", "Encode an image; its id is a hash of the file"),
        *(ImageAnswer, _WORK, "image"),
    ),
    Operation(
        *("PUT", _IMAGE, "put_image", "Encode an image under a new id of the caller's"),
        *(ImageAnswer, (404, *_WORK), "image"),
    ),
    Operation("GET", _IMAGE, "get_image", "Find an image", ImageAnswer, (404, 429)),
    Operation("DELETE", _IMAGE, "delete_image", "Forget an image and its sessions", None, (404,)),
    Operation(
        *("GET", f"{_IMAGE}/embedding", "get_embedding", "The file of an embedding"),
        *("application/octet-stream", (404, 429)),
    ),
    Operation(
        *("POST", f"{_IMAGE}/masks", "post_masks", "Masks of objects from points and boxes"),
        *(MasksAnswer, (404, *_WORK), "prompts"),
    ),
    Operation("GET", "/v1/model", "get_model", "What is served", ModelAnswer),
    Operation("GET", "/metrics", "get_metrics", "For Prometheus", "text/plain"),
    Operation("GET", "/openapi.json", "get_openapi", "This document", "application/json"),
    Operation(
        *("GET", "/livez", "get_livez", "Whether the server answers"),
        *("text/plain", (), "", True),
    ),
    Operation(
        *("GET", "/readyz", "get_readyz", "Whether the model answers rightly"),
        *(HealthAnswer, (503,), "", True),
    ),
)
_STATUSES = {
    400: "the request makes no sense",
    401: "the API key is missing or wrong",
    404: "no image under this id: send it (again)",
    408: "the request came too slowly",
    413: "more than the limits allow",
    415: "another media type is expected",
    429: "as much is waiting as may wait: try again later",
    500: "the model failed",
    503: "the model is not well",
    504: "no answer within the time that a request has",
}


def openapi(has_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        has_key: whether an API key is asked for.
    """
    types = (MasksQuestion, ImageAnswer, MasksAnswer, ModelAnswer, HealthAnswer, ErrorAnswer)
    references, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema = dict(zip(types, references, strict=True))
    binary = {"type": "string", "format": "binary"}
    form = {"type": "object", "properties": {"image": binary}, "required": ["image"]}
    bodies = {
        "image": {
            "image/jpeg": {"schema": binary},
            "image/png": {"schema": binary},
            "multipart/form-data": {"schema": form},
        },
        "prompts": {"application/json": {"schema": schema[MasksQuestion]}},
    }
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        answer = operation.answer
        if answer is None:
            responses: dict[str, Any] = {"204": {"description": "done"}}
        else:
            content: dict[str, Any] = (
                {answer: {}} if isinstance(answer, str) else _json(schema[answer])
            )
            responses = {"200": {"description": operation.summary, "content": content}}
        keyed = has_key and not operation.is_public
        for status in (*operation.errors, *([401] if keyed else [])):
            body = schema[HealthAnswer if status == 503 else ErrorAnswer]
            responses[str(status)] = {"description": _STATUSES[status], "content": _json(body)}
        described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
        if operation.takes:
            described["requestBody"] = {"required": True, "content": bodies[operation.takes]}
        if "{image_id}" in operation.path:
            name = {"name": "image_id", "in": "path", "required": True}
            described["parameters"] = [name | {"schema": {"type": "string", "pattern": NAME}}]
        if keyed:
            described["security"] = [{"key": []}]
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    schemes = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sam3rt", "version": __version__},
        "paths": paths,
        "components": {"schemas": components} | (schemes if has_key else {}),
    }


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
