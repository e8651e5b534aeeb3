"""``sam3rt segment``: images, prompts, and masks in the form that is asked for."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

from .. import geometry
from ..errors import InvalidInputError, PromptError
from .folder import run_many
from .jobs import STDIN, Images, Job, Prompt, check_names, find_images, read_prompts
from .options import (
    add_bundle_argument,
    add_model_options,
    load_from_options,
    named_path,
    number,
    numbers,
    positive_int,
    printable,
    progress_printer,
)
from .output import OVERLAY, RESULT, result_folder
from .worker import Worker, read
from .writers import FORMATS, as_json, write_pictures, write_text

HELP = "segment images from clicks and boxes, or everything in them"
DESCRIPTION = """\
Segment images from clicks and boxes, or everything in them.

Of a file of several pictures (TIFF, GIF) the first is taken.

Coordinates are pixels of the upright image: an EXIF orientation is applied first. All --point
belong to one object; each --points and each --box is an object of its own. Where there are both
clicks and boxes, the first box belongs to the first object, and so on.

One image, and no --prompts: the output folder gets, all at once,
  mask_0.png, ...   0 and 255, the image's size, best score of each object first
  overlay.png       the best mask of each object, its outline, score and the prompts
  result.json       scores, areas, prompts, model and times
Results of an earlier run there are replaced. Other files are left alone, the image above all.

Many images (files, folders, quoted patterns), by --format:
  png       NAME/mask_0.png, ... as above, a folder for each image
  coco      annotations.json, masks as compressed run lengths
  yolo      labels/NAME.txt, outlines as Ultralytics reads them, and classes.txt
  labelme   NAME.json, outlines without holes
All but png hold the best mask of each object. results.jsonl says what is done: the same command
again goes on where it was stopped. Images that fail are listed at the end, with exit status 1.
"""
EPILOG = """\
prompts.jsonl has a line for each object; one image may have many:
  {"image": "a/cat.jpg", "points": [[225, 150], [60, 280]], "labels": [1, 0], "name": "cat"}
  {"image": "a/cat.jpg", "box": [20, 10, 400, 290]}
"image" is looked for in the folders given, else beside prompts.jsonl, else here. "points" or "box"
or both; "labels" are 1 (the object, also where they are left out) or 0; "name" is the category.

examples:
  sam3rt segment photo.jpg --point 225,150 --point 60,280,0 -o masks
  sam3rt segment photo.jpg --points "225,150 60,280,0" --points 400,30 -o masks
  curl -L URL | sam3rt segment - --box 20,10,400,290 -o masks
  sam3rt segment imgs/ --prompts prompts.jsonl --format coco -o out
  sam3rt segment photo.jpg --everything --points-per-side 16 -o masks
  sam3rt segment "imgs/**/*.jpg" --point 320,240 --format yolo -o out
"""


_POINTS_PER_SIDE = 32
# SAM's own names and defaults.
_EVERYTHING: tuple[tuple[str, Any, Any, str], ...] = (
    ("--points-per-side", positive_int, _POINTS_PER_SIDE, "points of the grid along a side"),
    ("--pred-iou-thresh", number, 0.88, "drop masks of a lower predicted IoU"),
    ("--stability-score-thresh", number, 0.95, "drop masks that change more with the threshold"),
    ("--box-nms-thresh", number, 0.7, "drop the worse of two masks whose boxes overlap more"),
    ("--crop-n-layers", int, 0, "also cut the image up, so often"),
    ("--min-mask-region-area", number, 0, "remove smaller holes and islands, pixels"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.epilog = EPILOG
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, folders, quoted patterns, or - for an image from standard input",
    )
    parser.add_argument(
        "--point",
        dest="point",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y[,LABEL]",
        help="a click; LABEL is 1 for the object (default) or 0 for background; repeatable",
    )
    parser.add_argument(
        "--points",
        action="append",
        default=[],
        type=_points,
        metavar='"X,Y[,LABEL] ..."',
        help="the clicks of one object, with spaces or semicolons between them; repeatable",
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
        "--prompts",
        type=named_path,
        metavar="FILE",
        help="prompts.jsonl with the prompts of each image (below), or - for standard input",
    )
    parser.add_argument(
        "--everything",
        action="store_true",
        help="all objects in the image, from a grid of points, without prompts",
    )
    for name, parse, default, text in _EVERYTHING:
        parser.add_argument(
            name, type=parse, metavar="N", help=f"for --everything: {text} (default: {default})"
        )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="png",
        help="what is written for many images (default: png)",
    )
    parser.add_argument(
        "--best-only", action="store_true", help="only the mask of the best score of each object"
    )
    parser.add_argument(
        "--single-mask",
        action="store_true",
        help="one mask per object instead of three of different extent",
    )
    add_bundle_argument(parser, "--bundle")
    parser.add_argument(
        *("-o", "--output"),
        type=named_path,
        required=True,
        metavar="DIR",
        help="folder for the results",
    )
    parser.add_argument(
        "--mask-threshold", type=number, default=0.0, help="logits above it are object (default: 0)"
    )
    parser.add_argument(
        "--max-hole-area",
        type=number,
        metavar="PIXELS",
        help="fill holes up to this many low-resolution pixels (default: as the model's own "
        "predictor: 256 for SAM 3, 0 for MobileSAM)",
    )
    parser.add_argument(
        "--max-sprinkle-area",
        type=number,
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
    parser.add_argument(
        "--json", action="store_true", help="print the results as JSON, a line for each of many"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but what went wrong")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Segment and write the results."""
    images = find_images(options.images, options.output)
    calls = _calls(options)
    ways = {"--prompts": options.prompts is not None, "--everything": options.everything}
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) + bool(calls) > 1:
        other = "--point, --points or --box as well" if calls else f"{chosen[1]} as well"
        raise PromptError(chosen[0], other, "one of them")
    if not chosen and not calls:
        raise PromptError("prompts", "neither --point nor --box", "at least one of them")
    for name, *_ in _EVERYTHING:
        if not options.everything and getattr(options, _attribute(name)) is not None:
            raise InvalidInputError(name, "no --everything", "--everything with it")
    piped = STDIN in options.images
    if piped and (len(options.images) > 1 or str(options.prompts) == STDIN):
        raise InvalidInputError("image", "- and more", "- alone, and standard input once")
    with _size_limit(options.max_pixels):
        if images.single and options.prompts is None and options.format == "png":
            ((path, name),) = images.files.items()
            return _run_single(Job(path, name, calls), options)
        if piped:
            raise InvalidInputError("image", "-", "files where there is --prompts or --format")
        return _run_many(images, calls, options)


def _run_many(images: Images, calls: tuple[Prompt, ...], options: argparse.Namespace) -> int:
    missing = list(images.problems)
    if options.prompts is not None:
        jobs, gone, notes = read_prompts(options.prompts, images)
        missing += gone
    else:
        jobs = [Job(path, name, calls) for path, name in images.files.items()]
        notes = [f"passed over: {images.others()}"] * bool(images.passed_over)
    for note in notes if not options.quiet else ():
        print(printable(note), file=sys.stderr)
    if not jobs and not missing:
        raise InvalidInputError("image", "none", "image files, folders or patterns")
    if options.format != "coco":  # all of it is one file
        check_names(jobs)
    output = options.output.resolve()
    if options.format == "png" and output in (folder.resolve() for folder in images.folders):
        raise InvalidInputError("--output", "the images' own folder", "another, for --format png")
    return run_many(jobs, missing, _worker, options)


def _attribute(name: str) -> str:
    return name[2:].replace("-", "_")


def _worker(options: argparse.Namespace) -> Worker:
    """A worker with the model and the generator that the options ask for."""
    given = {_attribute(name): getattr(options, _attribute(name)) for name, *_ in _EVERYTHING}
    chosen = {name: value for name, value in given.items() if value is not None}
    return Worker(load_from_options(options), options, chosen if options.everything else None)


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


def _run_single(job: Job, options: argparse.Namespace) -> int:
    clock = _Clock()
    image = read(job)
    clock.stop("read")
    with result_folder(options.output, job.image) as folder:
        worker = _worker(options)
        worker.check(job, image)
        worker.model.backend.prepare()
        clock.stop("load")
        embedding = worker.encode(image)
        clock.stop("encode")
        say = progress_printer()
        if say and options.everything and not options.quiet:
            side = options.points_per_side or _POINTS_PER_SIDE
            say(f"asking for what is at {side * side} points: a minute or two on a CPU")
        result = worker.segment(job, image, embedding)
        clock.stop("predict")
        entries = write_pictures(folder, result, not options.no_overlay)
        clock.stop("write")
        document = worker.document(job, result, entries, None if options.no_overlay else OVERLAY)
        total = round(sum(clock.seconds.values()), 4)
        document["seconds"] = {**clock.seconds, "total": total}
        write_text(folder / RESULT, as_json(document, 2))
    if options.json:
        print(as_json(document, 2), end="")
    elif not options.quiet:
        _print_table(entries, options, clock.seconds)
    return 0


class _Clock:
    """What each step of a run took, as the user waits for it.

    Attributes:
        seconds: by the step's name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stop(self, name: str) -> None:
        """End a step, and begin the next."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 4)
        self._last = now


def _point(text: str) -> tuple[float, float, int]:
    values = numbers(text, (2, 3), "X,Y or X,Y,LABEL")
    label = values[2] if len(values) == 3 else 1.0
    if label not in (0.0, 1.0):
        raise argparse.ArgumentTypeError(f"{text!r}: the label must be 0 or 1")
    return values[0], values[1], int(label)


def _points(text: str) -> list[tuple[float, float, int]]:
    return [_point(part) for part in re.split(r"[\s;]+", text.strip())]


def _box(text: str) -> list[float]:
    box = numbers(text, (4,), "X0,Y0,X1,Y1")
    if box[2] < box[0] or box[3] < box[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: X1 must not be below X0, nor Y1 below Y0")
    return box


def _calls(options: argparse.Namespace) -> tuple[Prompt, ...]:
    """The one decoder call that the options ask for, if any."""
    clicks = [options.point] * bool(options.point) + options.points
    boxes = options.boxes
    if clicks and boxes and len(clicks) != len(boxes):
        raise PromptError(
            "--point",
            f"clicks of {len(clicks)} and boxes of {len(boxes)} objects",
            "one kind, or both for each object",
        )
    call: Prompt = {}
    if clicks:
        coords = [[p[:2] for p in some] for some in clicks]
        labels = [[p[2] for p in some] for some in clicks]
        call["point_coords"] = coords if len(clicks) > 1 else coords[0]
        call["point_labels"] = labels if len(clicks) > 1 else labels[0]
    if boxes:
        call["box"] = boxes if len(boxes) > 1 else boxes[0]
    return (call,) if call else ()


def _print_table(
    entries: list[dict[str, Any]], options: argparse.Namespace, seconds: dict[str, float]
) -> None:
    unit = "predicted IoU" if not entries or "predicted_iou" in entries[0] else "IoU, log-odds"
    print(f"{'mask':<14}{'object':>7}{unit:>15}{'area':>11}")
    for entry in entries:
        score = entry.get("predicted_iou", entry.get("predicted_iou_log_odds"))
        print(f"{entry['file']:<14}{entry['object']:>7}{score:>15.4f}{entry['area']:>11}")
    # The automatic mask generator encodes as it goes.
    encoded = "" if options.everything else f"encoded in {seconds['encode']:.2f} s, "
    took = seconds["predict"]
    predicted = f"{took * 1e3:.0f} ms" if took < 1 else f"{took:.2f} s"
    what = "results" if options.no_overlay else f"results and {OVERLAY}"
    print(
        f"read in {seconds['read']:.2f} s, loaded in {seconds['load']:.2f} s, "
        f"{encoded}predicted in {predicted}, written in {seconds['write']:.2f} s; {what} in "
        f"{printable(str(options.output))}"
    )
