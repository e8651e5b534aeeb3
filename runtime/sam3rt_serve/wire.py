"""What crosses the wire: requests, answers, forms of masks, and their description as OpenAPI."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import PIL.Image
from msgspec import Meta, Struct
from numpy.typing import NDArray

from sam3rt import __version__

from .core import Limits, ObjectMasks

# A caller's own image ids and session names.
NAME = r"^[A-Za-z0-9._-]{1,128}$"
MaskFormat = Literal["png", "rle", "polygons", "bits"]
# What a JSON body of the largest allowed request may take, far from the limits of objects.
JSON_BYTES = 4 << 20


class ObjectQuestion(Struct, forbid_unknown_fields=True):
    """One object's prompts, (x, y) in pixels of the upright image: points, a box, or both."""

    points: list[tuple[float, float]] = []
    labels: list[Annotated[int, Meta(ge=-1, le=3, description="1 object, 0 background")]] = []
    box: tuple[float, float, float, float] | None = None


class MasksQuestion(Struct, forbid_unknown_fields=True):
    """A request for masks of one image's objects."""

    objects: Annotated[list[ObjectQuestion], Meta(min_length=1)]
    multimask: bool = True
    format: MaskFormat = "png"
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
    """Masks of one object.

    ``png``: base64 of a 1-bit PNG. ``bits``: base64 of height * width bits, row by row, the
    highest bit of a byte first. ``rle``: COCO's compressed RLE. ``polygons``: lists of
    [x0, y0, x1, y1, ...]. A box is [x0, y0, x1, y1], with x1 and y1 one pixel beyond the mask, and
    null for an empty mask.
    """

    masks: list[str | RleMask | list[list[float]]]
    scores: list[float]
    boxes: list[list[int] | None]
    refined: bool


class MasksAnswer(Struct):
    """Masks of each object, in the order of the request."""

    objects: list[ObjectAnswer]
    height: int
    width: int
    format: MaskFormat
    milliseconds: float


class ModelAnswer(Struct):
    """What is served. Sizes are [height, width]; limits are those of one request."""

    name: str
    family: str
    image_size: list[int]
    low_res_mask_size: list[int]
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
    encode_seconds: float
    decode_seconds: float


class ErrorAnswer(Struct):
    """Why there is no answer. ``kind`` is stable, ``error`` is for people."""

    error: str
    kind: str


def _png(mask: NDArray[np.bool_]) -> str:
    height, width = mask.shape
    image = PIL.Image.frombytes("1", (width, height), np.packbits(mask, axis=1).tobytes())
    stream = io.BytesIO()
    # Level 1: a 1-bit image of a megapixel takes under a millisecond.
    image.save(stream, "PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode()


def _bits(mask: NDArray[np.bool_]) -> str:
    return base64.b64encode(np.packbits(mask).tobytes()).decode()


FORMS: dict[str, Callable[[NDArray[np.bool_]], Any]] = {"png": _png, "bits": _bits}


def object_answer(found: ObjectMasks, form: str) -> ObjectAnswer:
    """One object's masks as they are sent."""
    return ObjectAnswer(
        [FORMS[form](mask) for mask in found.masks],
        [float(score) for score in found.scores],
        [box_of(mask) for mask in found.masks],
        found.is_refined,
    )


def box_of(mask: NDArray[np.bool_]) -> list[int] | None:
    """[x0, y0, x1, y1] around a mask, the last two exclusive; ``None`` for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def openapi(limits: Limits, with_key: bool) -> dict[str, Any]:
    """The OpenAPI 3.1 document.

    Args:
        limits: named in the descriptions.
        with_key: whether an API key is asked for.
    """
    structs = (
        MasksQuestion,
        ImageAnswer,
        MasksAnswer,
        ModelAnswer,
        HealthAnswer,
        ErrorAnswer,
    )
    schemas, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    by_name = dict(zip((struct.__name__ for struct in structs), schemas, strict=True))

    def answers(what: str, content: Any, *errors: int) -> dict[str, Any]:
        failed = {"application/json": {"schema": by_name["ErrorAnswer"]}}
        codes = (*((401,) if with_key else ()), *errors)
        return {"200": {"description": what, "content": content}} | {
            str(code): {"description": _ERRORS[code], "content": failed} for code in codes
        }

    def json(name: str) -> dict[str, Any]:
        return {"application/json": {"schema": by_name[name]}}

    binary = {"schema": {"type": "string", "format": "binary"}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    image_id = {
        "name": "image_id",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "pattern": NAME},
    }
    picture = {
        "required": True,
        "content": {
            "image/jpeg": binary,
            "image/png": binary,
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": binary["schema"]},
                    "required": ["image"],
                }
            },
        },
        "description": f"at most {limits.image_bytes} bytes and {limits.pixels} pixels",
    }
    image = answers("the image", json("ImageAnswer"), 400, 408, 413, 415, 429, 500, 504)
    one = answers("the image", json("ImageAnswer"), 404, 429)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sam3rt", "version": __version__},
        "paths": {
            "/v1/images": {
                "post": {
                    "summary": "Encode an image; its id is a hash of the file",
                    "requestBody": picture,
                    "responses": image,
                }
            },
            "/v1/images/{image_id}": {
                "parameters": [image_id],
                "get": {"summary": "Find an image", "responses": one},
                "put": {
                    "summary": "Encode an image under an id of the caller's",
                    "requestBody": picture,
                    "responses": image,
                },
                "delete": {
                    "summary": "Forget an image and its sessions",
                    "responses": {"204": {"description": "forgotten"}}
                    | {k: v for k, v in one.items() if k != "200"},
                },
            },
            "/v1/images/{image_id}/embedding": {
                "parameters": [image_id],
                "get": {
                    "summary": "The embedding's file, for decoders elsewhere",
                    "responses": answers(
                        "a safetensors file", {"application/octet-stream": binary}, 404, 429, 500
                    ),
                },
            },
            "/v1/images/{image_id}/masks": {
                "parameters": [image_id],
                "post": {
                    "summary": "Masks of objects from points and boxes",
                    "requestBody": {"required": True, "content": json("MasksQuestion")},
                    "responses": answers(
                        "masks",
                        json("MasksAnswer"),
                        *(400, 404, 408, 413, 415, 429, 500, 504),
                    ),
                },
            },
            "/v1/model": {
                "get": {"summary": "What is served", "responses": answers("", json("ModelAnswer"))}
            },
            "/livez": {"get": {"responses": {"200": {"description": "alive", "content": text}}}},
            "/readyz": {
                "get": {
                    "summary": "Ask the model a question whose answer is known",
                    "responses": {
                        "200": {"description": "well", "content": json("HealthAnswer")},
                        "503": {"description": "not well", "content": json("HealthAnswer")},
                    },
                }
            },
            "/metrics": {
                "get": {"summary": "For Prometheus", "responses": answers("metrics", text)}
            },
        },
        "components": {
            "schemas": components,
            **(
                {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
                if with_key
                else {}
            ),
        },
        **({"security": [{"key": []}]} if with_key else {}),
    }


_ERRORS = {
    400: "the request makes no sense",
    401: "the API key is missing or wrong",
    404: "no image under this id: send it (again)",
    408: "the request's body came too slowly",
    413: "more than the limits allow",
    415: "another media type is expected",
    429: "as much is waiting as may wait; try again later",
    500: "the model failed",
    504: "no answer within the time that a request has",
}
