"""The forms in which ``sam3rt segment`` writes its results."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..bundle.files import atomic_write
from ..masks.polygons import joined
from ..results import Segmentation
from .jobs import Job
from .output import OVERLAY

# A third of the time that Pillow would take by default, for up to a third more bytes.
_PNG_LEVEL = 1
# How far polygons may leave the pixels' edges, pixels: enough for slanted lines without steps.
_TOLERANCE = 1.0

ANNOTATIONS = "annotations.json"
CLASSES = "classes.txt"


def mask_entries(result: Segmentation) -> list[dict[str, Any]]:
    """What ``result.json`` says of each mask, but for its file."""
    score = "predicted_iou" if result.score_unit == "iou" else "predicted_iou_log_odds"
    return [
        {
            "object": number,
            score: round(value, 6),
            "area": area,
            "bounding_box": box if area else None,
        }
        for number, value, area, box in zip(
            result.objects.tolist(),
            result.scores.tolist(),
            result.area.tolist(),
            result.boxes.tolist(),
            strict=True,
        )
    ]


def write_pictures(folder: Path, result: Segmentation, overlay: bool) -> list[dict[str, Any]]:
    """Write ``mask_0.png`` and so on, and ``overlay.png`` if asked; return the masks' entries."""
    entries = []
    for index, entry in enumerate(mask_entries(result)):
        name = f"mask_{index}.png"
        (mask,) = result[index].masks
        save_png(folder / name, PIL.Image.fromarray(mask.astype(np.uint8) * 255))
        entries.append({"file": name, **entry})
    if overlay:
        save_png(folder / OVERLAY, result.plot())
    return entries


def save_png(path: Path, image: PIL.Image.Image) -> None:
    """Write a PNG file, whole or not at all."""
    with atomic_write(path) as stream:
        image.save(stream, "PNG", compress_level=_PNG_LEVEL)


def coco_annotations(result: Segmentation, job: Job) -> list[dict[str, Any]]:
    """An image's COCO annotations, with the object's name as ``category`` for the time being."""
    annotations: list[dict[str, Any]] = result.to_coco()["annotations"]
    for annotation in annotations:
        for key in ("id", "image_id", "category_id"):
            del annotation[key]
        annotation["category"] = job.name_of(annotation["object"])
    return annotations


def coco_document(entries: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The COCO document of many images.

    Args:
        entries: for each image ``image``, ``width``, ``height`` and ``annotations``.
        names: the first categories', whose numbers begin with 1; others follow.
    """
    known = [annotation["category"] for entry in entries for annotation in entry["annotations"]]
    names = list(dict.fromkeys([*names, *known]))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, entry in enumerate(entries, 1):
        size = {"height": entry["height"], "width": entry["width"]}
        images.append({"id": image_id, "file_name": entry["image"], **size})
        for annotation in entry["annotations"]:
            rest = {key: value for key, value in annotation.items() if key != "category"}
            category = names.index(annotation["category"]) + 1
            number = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category}
            annotations.append({**number, **rest})
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def yolo_text(result: Segmentation, job: Job, names: Sequence[str]) -> str:
    """Lines of Ultralytics' segmentation labels: a class, then x and y as shares of the image.

    An object of several pieces or with holes is one outline that goes from one to the next.
    """
    height, width = result.size
    lines = []
    for number, rings in zip(
        result.objects.tolist(), result.polygons(_TOLERANCE, holes=True), strict=True
    ):
        if rings:
            shares = joined(rings) / np.array([width, height])
            values = " ".join(f"{value:.6f}" for value in shares.ravel().tolist())
            lines.append(f"{names.index(job.name_of(number))} {values}\n")
    return "".join(lines)


def labelme_document(result: Segmentation, job: Job, path: Path) -> dict[str, Any]:
    """The document of the program labelme, whose polygons have no holes.

    Args:
        result: the best mask of each object.
        job: whose result it is.
        path: where the document will lie; the image's path is written relative to its folder.
    """
    height, width = result.size
    shapes = [
        {
            "label": job.name_of(number),
            "points": ring.tolist(),
            "group_id": number,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }
        for number, rings in zip(result.objects.tolist(), result.polygons(_TOLERANCE), strict=True)
        for ring in rings
    ]
    try:
        image = os.path.relpath(job.image, path.parent)
    except ValueError:  # another drive
        image = str(job.image.resolve())
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image.replace(os.sep, "/"),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(text.encode())


def as_json(document: Any, indent: int | None = None) -> str:
    """A document as a line of JSON, or as several."""
    return json.dumps(document, indent=indent) + "\n"


Encoder = Callable[[Segmentation, Job, Path, Sequence[str]], str]

# The file beside an image's name, and its content, for the formats with one file an image.
FILES: dict[str, tuple[str, Encoder]] = {
    "yolo": ("labels/{}.txt", lambda result, job, _, names: yolo_text(result, job, names)),
    "labelme": (
        "{}.json",
        lambda result, job, path, _: as_json(labelme_document(result, job, path), 2),
    ),
}
FORMATS = ("png", "coco", *FILES)
