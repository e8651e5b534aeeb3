"""The stages of a call timed apart, and end to end."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sam3rt import masks as postprocess
from sam3rt.geometry import preprocess, to_rgb
from sam3rt.predictor import SAM3InteractiveImagePredictor
from sam3rt.prompts import pack

from .candidates import Candidate
from .document import CallRow, StageRow
from .scene import Request, click, requests
from .timing import Call, Effort, alternate

HOST = "host"
MULTI = ("pred_masks", "iou_scores")
# SAM 3's default, so that filling holes is measured for models that fill none by themselves too.
_HOLE_AREA = 256.0

Image = NDArray[np.uint8]
Progress = Callable[[str], None]


def time_stages(
    candidates: list[Candidate], image: Image, effort: Effort, progress: Progress
) -> list[StageRow]:
    """Time each stage of a one-click call by itself."""
    rows = _host_stages(candidates[0], image, effort, progress)
    manifest = candidates[0].model.manifest
    pixels, place = preprocess(manifest.image, image)
    packed = pack(click(image.shape[:2]).prompts, manifest.prompts, place)
    features: dict[str, Any] = {}

    def encode(candidate: Candidate) -> None:
        features[candidate.name] = candidate.model.backend.encode(pixels)

    progress("stages: encode")
    rows += _rows("encode", candidates, encode, effort, progress)
    maps = features[candidates[0].name].numpy()
    for stage, action in (
        ("decode", lambda c: c.model.backend.decode(features[c.name], packed, MULTI)),
        ("upload features", lambda c: c.model.backend.upload(maps)),
        ("download features", lambda c: features[c.name].numpy()),
    ):
        progress(f"stages: {stage}")
        rows += _rows(stage, candidates, action, effort, progress)
    return rows


def time_calls(
    candidates: list[Candidate],
    predictors: Mapping[str, SAM3InteractiveImagePredictor],
    image: Image,
    effort: Effort,
    progress: Progress,
) -> list[CallRow]:
    """Time ``set_image`` and ``predict``, NumPy in to NumPy out, the candidates in turn.

    Every predictor has its image set afterwards.
    """
    calls: list[tuple[str, Callable[[Candidate], Any]]] = [
        ("set_image", lambda c: predictors[c.name].set_image(image))
    ]
    calls += [
        (f"predict: {request.name}", partial(_predict, predictors, request))
        for request in requests(image.shape[:2])
    ]
    rows = []
    for name, action in calls:
        progress(f"side by side: {name}")
        times = alternate({c.name: partial(action, c) for c in candidates}, effort, progress)
        rows += [CallRow(c.name, name, times[c.name]) for c in candidates]
    return rows


def _predict(
    predictors: Mapping[str, SAM3InteractiveImagePredictor], request: Request, candidate: Candidate
) -> Any:
    return predictors[candidate.name].predict(**request.arguments())


def _host_stages(
    candidate: Candidate, image: Image, effort: Effort, progress: Progress
) -> list[StageRow]:
    """What happens in NumPy and Pillow, whichever backend runs."""
    manifest = candidate.model.manifest
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=92)
    request = click(image.shape[:2])
    place = preprocess(manifest.image, image)[1]
    # Logits with the speckles that hole filling is there for, whatever the weights are.
    height, width = manifest.masks.low_res_size
    y, x = np.mgrid[0:height, 0:width]
    logits = np.float32(8) - np.hypot(y - height / 2, x - width / 2).astype(np.float32) / 8
    logits += np.random.default_rng(0).standard_normal(logits.shape).astype(np.float32)
    masks = np.empty(image.shape[:2], np.float32)
    stages: dict[str, Call] = {
        "decode image": lambda: to_rgb(PIL.Image.open(io.BytesIO(file.getvalue()))),
        "preprocess": lambda: preprocess(manifest.image, image),
        "pack prompts": lambda: pack(request.prompts, manifest.prompts, place),
        "fill holes, one mask": lambda: postprocess.clean(logits, 0.0, _HOLE_AREA, 0.0),
        "upsample and threshold, one mask": lambda: postprocess.upsample(
            logits, place, manifest.image, manifest.masks, masks, 0.0
        ),
    }
    rows = []
    for name, call in stages.items():
        progress(f"stages: {name}")
        rows.append(StageRow(HOST, name, "host", alternate({name: call}, effort)[name]))
    return rows


def _rows(
    stage: str,
    candidates: list[Candidate],
    action: Callable[[Candidate], Any],
    effort: Effort,
    progress: Progress,
) -> list[StageRow]:
    times = alternate({c.name: partial(action, c) for c in candidates}, effort, progress)
    return [StageRow(c.name, stage, "host", times[c.name]) for c in candidates]
