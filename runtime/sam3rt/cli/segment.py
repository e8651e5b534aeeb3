"""``sam3rt segment``: one image, prompts, masks as PNG files."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from ..bundle.files import atomic_write
from ..errors import ImageError, PromptError
from ..geometry import to_rgb
from ..model import SegmentationModel
from ..overlay import draw_overlay
from ..predictor import SAM3InteractiveImagePredictor
from .options import add_model_options, load_from_options, numbers

HELP = "segment one image from clicks and boxes"
DESCRIPTION = """\
Segment one image from clicks and boxes.

Coordinates are pixels of the upright image: an EXIF orientation is applied first. Several
--point belong to one object. Several --box are several objects, segmented in one call; points
can then not be given. Without any prompt the model shows what it finds most prominent.

Writes to the output folder:
  mask_0.png, ...   0 and 255, the image's size, best predicted IoU first
  overlay.png       the best mask of each object, its outline, score and the prompts
  result.json       scores, areas, prompts, model and times
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="any file Pillow reads")
    parser.add_argument(
        "--point",
        dest="points",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y[,LABEL]",
        help="a click; LABEL is 1 for the object (default) or 0 for background; repeatable",
    )
    parser.add_argument(
        "--box",
        dest="boxes",
        action="append",
        default=[],
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="a box around an object; repeatable",
    )
    parser.add_argument(
        "--single-mask",
        action="store_true",
        help="one mask per object instead of three of different extent",
    )
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="model (default: the bundled MobileSAM)"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the results"
    )
    parser.add_argument(
        "--mask-threshold", type=float, default=0.0, help="logits above it are object (default: 0)"
    )
    parser.add_argument(
        "--max-hole-area",
        type=float,
        metavar="PIXELS",
        help="fill holes up to this many low-resolution pixels (default: as the model's own "
        "predictor: 256 for SAM 3, 0 for MobileSAM)",
    )
    parser.add_argument(
        "--max-sprinkle-area",
        type=float,
        default=0.0,
        metavar="PIXELS",
        help="remove islands up to this many low-resolution pixels (default: 0)",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Segment and write the results."""
    image = read_image(options.image)
    if len(options.boxes) > 1 and options.points:
        raise PromptError("--point", "clicks and several boxes", "clicks with at most one box")
    model = load_from_options(options)
    holes = {} if options.max_hole_area is None else {"max_hole_area": options.max_hole_area}
    predictor = SAM3InteractiveImagePredictor(
        model,
        mask_threshold=options.mask_threshold,
        max_sprinkle_area=options.max_sprinkle_area,
        mask_dtype=np.bool_,
        **holes,
    )
    prompts = _prompts(options)
    loading = time.perf_counter()
    model.backend.prepare()
    start = time.perf_counter()
    predictor.set_image(image)
    encoded = time.perf_counter()
    masks, scores, _ = predictor.predict(**prompts, multimask_output=not options.single_mask)
    done = time.perf_counter()
    # One object comes without an axis for objects.
    masks = masks.reshape(-1, *masks.shape[-3:])
    scores = scores.reshape(len(masks), -1)
    results = _sorted_results(masks, scores)
    seconds = {
        "load": round(start - loading, 4),
        "encode": round(encoded - start, 4),
        "predict": round(done - encoded, 4),
    }
    _write(options, image, model, results, prompts, seconds)
    _print_table(results, options.output, seconds)
    return 0


def read_image(path: Path) -> NDArray[np.uint8]:
    """Read an image file, upright, as uint8 [H, W, 3].

    Raises:
        ImageError: it is missing, cut, too large or of a type that does not convert.
    """
    try:
        with PIL.Image.open(path) as image:
            image.load()
            upright = PIL.ImageOps.exif_transpose(image)
            return to_rgb(upright, f"image {path}")
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise ImageError("image", f"{path}: {error}", "an image of ordinary size") from error
    except Exception as error:  # Pillow's plugins raise many classes on damaged files
        raise ImageError(
            "image", f"{path}: {error or type(error).__name__}", "a readable image file"
        ) from error


def _point(text: str) -> tuple[float, float, int]:
    values = numbers(text, (2, 3), "X,Y or X,Y,LABEL")
    label = values[2] if len(values) == 3 else 1.0
    if label not in (0.0, 1.0):
        raise argparse.ArgumentTypeError(f"{text!r}: the label must be 0 or 1")
    return values[0], values[1], int(label)


def _box(text: str) -> list[float]:
    box = numbers(text, (4,), "X0,Y0,X1,Y1")
    if box[2] < box[0] or box[3] < box[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: X1 must not be below X0, nor Y1 below Y0")
    return box


def _prompts(options: argparse.Namespace) -> dict[str, Any]:
    prompts: dict[str, Any] = {}
    if options.points:
        prompts["point_coords"] = np.array([p[:2] for p in options.points], np.float32)
        prompts["point_labels"] = np.array([p[2] for p in options.points])
    if options.boxes:
        boxes = np.array(options.boxes, np.float32)
        prompts["box"] = boxes if len(boxes) > 1 else boxes[0]
    return prompts


def _sorted_results(
    masks: NDArray[np.bool_], scores: NDArray[np.float32]
) -> list[list[tuple[float, NDArray[np.bool_]]]]:
    """Per object, (score, mask) pairs with the best score first."""
    objects = []
    for object_masks, object_scores in zip(masks, scores, strict=True):
        order = np.argsort(-object_scores, kind="stable")
        objects.append([(float(object_scores[i]), object_masks[i]) for i in order])
    return objects


def _write(
    options: argparse.Namespace,
    image: NDArray[np.uint8],
    model: SegmentationModel,
    results: list[list[tuple[float, NDArray[np.bool_]]]],
    prompts: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (which, score, mask) in enumerate(_numbered(results)):
        name = f"mask_{number}.png"
        _save_png(folder / name, PIL.Image.fromarray(mask.astype(np.uint8) * 255))
        entries.append(
            {
                "file": name,
                "object": which,
                "predicted_iou": round(score, 6),
                "area": int(mask.sum()),
                "bounding_box": _bounding_box(mask),
            }
        )
    best = [ranked[0] for ranked in results]
    overlay = draw_overlay(
        image,
        np.stack([mask for _, mask in best]),
        scores=[score for score, _ in best],
        points=prompts.get("point_coords"),
        labels=prompts.get("point_labels"),
        boxes=None if "box" not in prompts else np.atleast_2d(prompts["box"]),
    )
    _save_png(folder / "overlay.png", overlay)
    document = {
        "image": str(options.image),
        "height": image.shape[0],
        "width": image.shape[1],
        "prompts": {name: np.asarray(value).tolist() for name, value in prompts.items()},
        "masks": entries,
        "overlay": "overlay.png",
        "model": {
            "name": model.manifest.name,
            "fingerprint": model.manifest.fingerprint,
            "backend": model.backend.name,
            "device": model.device,
        },
        "seconds": seconds,
    }
    with atomic_write(folder / "result.json") as stream:
        stream.write((json.dumps(document, indent=2) + "\n").encode())


def _numbered(
    results: list[list[tuple[float, NDArray[np.bool_]]]],
) -> list[tuple[int, float, NDArray[np.bool_]]]:
    """All masks in the order of their files, with the number of their object."""
    return [(which, score, mask) for which, masks in enumerate(results) for score, mask in masks]


def _save_png(path: Path, image: PIL.Image.Image) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())


def _bounding_box(mask: NDArray[np.bool_]) -> list[int] | None:
    """x0, y0, x1, y1 with x1 and y1 just outside, or ``None`` for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _print_table(
    results: list[list[tuple[float, NDArray[np.bool_]]]], folder: Path, seconds: dict[str, float]
) -> None:
    print(f"{'mask':<14}{'object':>7}{'predicted IoU':>15}{'area':>11}")
    for number, (which, score, mask) in enumerate(_numbered(results)):
        print(f"mask_{number}.png".ljust(14) + f"{which:>7}{score:>15.4f}{int(mask.sum()):>11}")
    print(
        f"loaded in {seconds['load']:.2f} s, encoded in {seconds['encode']:.2f} s, "
        f"predicted in {seconds['predict'] * 1e3:.0f} ms; results and overlay.png in {folder}"
    )
