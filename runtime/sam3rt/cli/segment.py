"""``sam3rt segment``: one image, prompts, masks as PNG files."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from .. import geometry
from ..bundle.files import atomic_write
from ..errors import PromptError, PromptWarning
from ..image_files import read_image
from ..masks.rle import box_around
from ..model import SegmentationModel
from ..overlay import draw_overlay
from ..predictor import SAM3InteractiveImagePredictor
from ..prompts import Prompts, pack
from .options import add_model_options, load_from_options, numbers, positive_int, printable
from .output import OVERLAY, RESULT, result_folder

HELP = "segment one image from clicks and boxes"
DESCRIPTION = """\
Segment one image from clicks and boxes, at least one of them.

Coordinates are pixels of the upright image: an EXIF orientation is applied first. Several
--point belong to one object. Several --box are several objects, segmented in one call; points
can then not be given.

Writes to the output folder, all at once:
  mask_0.png, ...   0 and 255, the image's size, best predicted IoU first
  overlay.png       the best mask of each object, its outline, score and the prompts
  result.json       scores, areas, prompts, model and times
Results of an earlier run there are replaced. Other files are left alone, the image above all.
"""

# A third of the time that Pillow would take by default, for up to a third more bytes.
_PNG_LEVEL = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
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
    parser.add_argument(
        "--no-overlay", action="store_true", help="write no overlay.png, which saves time"
    )
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        metavar="N",
        help=f"largest image that is taken, pixels (default: {geometry.MAX_PIXELS}, and "
        f"{geometry.MAX_SIDE} along a side)",
    )
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Segment and write the results."""
    if not options.points and not options.boxes:
        raise PromptError("prompts", "neither --point nor --box", "at least one of them")
    if len(options.boxes) > 1 and options.points:
        raise PromptError("--point", "clicks and several boxes", "clicks with at most one box")
    with _size_limit(options.max_pixels):
        return _segment(options)


@contextlib.contextmanager
def _size_limit(pixels: int | None) -> Iterator[None]:
    """Take images of so many pixels, of any shape, for the length of the block."""
    before = geometry.MAX_PIXELS, geometry.MAX_SIDE
    if pixels is not None:
        geometry.MAX_PIXELS, geometry.MAX_SIDE = pixels, max(before[1], pixels)
    try:
        yield
    finally:
        geometry.MAX_PIXELS, geometry.MAX_SIDE = before


def _segment(options: argparse.Namespace) -> int:
    clock = _Clock()
    image = read_image(options.image)
    clock.stop("read")
    with result_folder(options.output, options.image) as folder:
        model = load_from_options(options)
        prompts = _prompts(options)
        _check_prompts(prompts, model, image)
        holes = {} if options.max_hole_area is None else {"max_hole_area": options.max_hole_area}
        predictor = SAM3InteractiveImagePredictor(
            model,
            mask_threshold=options.mask_threshold,
            max_sprinkle_area=options.max_sprinkle_area,
            mask_dtype=np.bool_,
            **holes,
        )
        model.backend.prepare()
        clock.stop("load")
        predictor.set_image(image)
        clock.stop("encode")
        masks, scores, _ = predictor.predict(**prompts, multimask_output=not options.single_mask)
        clock.stop("predict")
        # One object comes without an axis for objects.
        masks = masks.reshape(-1, *masks.shape[-3:])
        scores = scores.reshape(len(masks), -1)
        results = _sorted_results(masks, scores)
        entries = _write_masks(folder, results)
        if not options.no_overlay:
            _save_png(folder / OVERLAY, _overlay(image, masks, scores, prompts))
        clock.stop("write")
        document = {
            "image": str(options.image),
            "height": image.shape[0],
            "width": image.shape[1],
            "prompts": {name: np.asarray(value).tolist() for name, value in prompts.items()},
            "masks": entries,
            "overlay": None if options.no_overlay else OVERLAY,
            "model": {
                "name": model.manifest.name,
                "fingerprint": model.manifest.fingerprint,
                "backend": model.backend.name,
                "device": model.device,
            },
            "seconds": clock.seconds,
        }
        with atomic_write(folder / RESULT) as stream:
            stream.write((json.dumps(document, indent=2) + "\n").encode())
    _print_table(entries, options, clock.seconds)
    return 0


class _Clock:
    """What each step of a run took, as the user waits for it.

    Attributes:
        seconds: by the step's name, with their sum as ``"total"``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        """End a step, and begin the next."""
        now = time.perf_counter()
        self.seconds.pop("total", None)
        self.seconds[name] = round(now - self._last, 4)
        self.seconds["total"] = round(now - self._start, 4)
        self._last = now


def _check_prompts(
    prompts: dict[str, Any], model: SegmentationModel, image: NDArray[np.uint8]
) -> None:
    """Refuse prompts before the image is encoded, and also what the predictor only warns of."""
    size = (image.shape[0], image.shape[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)
        try:
            pack(
                Prompts(**prompts),
                model.manifest.prompts,
                geometry.geometry(model.manifest.image, size),
            )
        except PromptWarning as warning:
            raise PromptError("prompts", str(warning), "pixels of the upright image") from None


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


def _write_masks(
    folder: Path, results: list[list[tuple[float, NDArray[np.bool_]]]]
) -> list[dict[str, Any]]:
    """Write the masks; return what result.json says of them."""
    entries: list[dict[str, Any]] = []
    for which, ranked in enumerate(results):
        for score, mask in ranked:
            name = f"mask_{len(entries)}.png"
            _save_png(folder / name, PIL.Image.fromarray(mask.astype(np.uint8) * 255))
            entries.append(
                {
                    "file": name,
                    "object": which,
                    "predicted_iou": round(score, 6),
                    "area": int(np.count_nonzero(mask)),
                    "bounding_box": list(box_around(mask)) if mask.any() else None,
                }
            )
    return entries


def _overlay(
    image: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    scores: NDArray[np.float32],
    prompts: dict[str, Any],
) -> PIL.Image.Image:
    return draw_overlay(
        image,
        masks,
        scores,
        points=prompts.get("point_coords"),
        labels=prompts.get("point_labels"),
        boxes=prompts.get("box"),
    )


def _save_png(path: Path, image: PIL.Image.Image) -> None:
    with atomic_write(path) as stream:
        image.save(stream, "PNG", compress_level=_PNG_LEVEL)


def _print_table(
    entries: list[dict[str, Any]], options: argparse.Namespace, seconds: dict[str, float]
) -> None:
    print(f"{'mask':<14}{'object':>7}{'predicted IoU':>15}{'area':>11}")
    for entry in entries:
        print(
            f"{entry['file']:<14}{entry['object']:>7}{entry['predicted_iou']:>15.4f}"
            f"{entry['area']:>11}"
        )
    what = "results" if options.no_overlay else f"results and {OVERLAY}"
    print(
        f"read in {seconds['read']:.2f} s, loaded in {seconds['load']:.2f} s, "
        f"encoded in {seconds['encode']:.2f} s, predicted in {seconds['predict'] * 1e3:.0f} ms, "
        f"written in {seconds['write']:.2f} s; {what} in {printable(str(options.output))}"
    )
