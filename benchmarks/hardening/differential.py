"""Random images and prompts by the thousand: ONNX Runtime against the PyTorch modules.

    python -m benchmarks.hardening.differential [--cases 3000] [--images 30]

Exports the small synthetic SAM 3 of tests/golden/sam3 (or takes --bundle and --checkpoint) and runs
every case twice: in ONNX Runtime on the bundle, and in PyTorch on the checkpoint it was made from.
A case disagrees where a difference exceeds the tolerances of the golden tests. Two things are not
differences but ties, counted apart: a pixel whose logit is within that tolerance of the threshold,
and a single mask for which the choice among four hangs on less than it. Exits with 1 where a case
disagrees. Needs the export extra.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser
from numpy.typing import NDArray

import sam3rt

# Those of tests/golden/test_golden_sam3.py.
LIMITS = {"features": 2e-3, "logits": 5e-3, "iou": 1e-3, "mask_pixels": 2e-4}


def random_image(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Smooth blobs, noise or flat colour, of any shape, uint8 [H, W, 3]."""
    from tests.golden.sam3 import synthetic

    height, width = (int(side) for side in np.exp(rng.uniform(np.log(8), np.log(900), 2)))
    kind = rng.integers(3)
    if kind == 0:
        return synthetic.image(int(rng.integers(1 << 30)), height, width)
    if kind == 1:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (height, width, 3)).copy()


def random_prompts(
    rng: np.random.Generator, height: int, width: int, masks: list[NDArray[np.float32]]
) -> dict[str, Any]:
    """Points, boxes and masks in any combination, in and around the image.

    Args:
        rng: where chance comes from.
        height: of the image.
        width: of the image.
        masks: low-resolution logits of earlier calls, [1, h, w] each.
    """
    size = np.array([width, height], np.float32)
    objects = int(rng.choice([1, 1, 1, 2, 3]))
    prompts: dict[str, Any] = {}
    if rng.random() < 0.7:
        count = int(rng.integers(0, 7))
        points = rng.uniform(-0.2, 1.2, (objects, count, 2)) * size
        labels = rng.choice([-1, 0, 1, 1, 1, 2, 3], (objects, count))
        several = objects > 1
        prompts["point_coords"] = points if several else points[0]
        prompts["point_labels"] = labels if several else labels[0]
    if rng.random() < 0.4:
        corners = np.sort(rng.uniform(-0.1, 1.1, (objects, 2, 2)), axis=1) * size
        boxes = corners.reshape(objects, 4)
        prompts["box"] = boxes if objects > 1 else boxes[0]
    if masks and rng.random() < 0.3:
        prompts["mask_input"] = masks[int(rng.integers(len(masks)))]
    return prompts


Prediction = tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]


def differences(ours: Prediction, theirs: Prediction) -> tuple[dict[str, float], int]:
    """Largest differences, and the number of pixels that differ as ties do.

    Args:
        ours: logits of the image's size, scores, low-resolution logits.
        theirs: likewise.
    """
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return dict.fromkeys(("logits", "iou", "mask_pixels"), float("inf")), 0
    differing = (ours[0] > 0) != (theirs[0] > 0)
    clear = differing & (np.abs(theirs[0]) > LIMITS["logits"])
    errors = {
        "logits": float(np.abs(ours[2] - theirs[2]).max()),
        "iou": float(np.abs(ours[1] - theirs[1]).max()),
        "mask_pixels": float(clear.mean(axis=(-2, -1)).max()),
    }
    return errors, int(differing.sum() - clear.sum())


def is_tie(ours: Prediction, theirs: Prediction, candidates: Prediction) -> bool:
    """Whether single masks differ because the choice among the four hangs by a hair.

    SAM takes the first mask where its stability (area over +0.05 by area over -0.05) is 0.98 or
    more, and otherwise the one of the other three with the largest predicted IoU.

    Args:
        ours: of a call for single masks.
        theirs: likewise.
        candidates: of the same call for three masks.
    """
    low_res, iou = candidates[2], candidates[1]
    objects = low_res.reshape(-1, *low_res.shape[-3:])
    scores = iou.reshape(len(objects), -1)
    pairs = zip(*(p[2].reshape(-1, *p[2].shape[-2:]) for p in (ours, theirs)), strict=True)
    for masks, values, (a, b) in zip(objects, scores, pairs, strict=True):
        if np.abs(a - b).max() <= LIMITS["logits"]:
            continue
        chosen = [_index(single, masks) for single in (a, b)]
        best = float(values.max())
        if any(k is not None and best - values[k] > LIMITS["iou"] for k in chosen):
            return False
        first = [single for single, k in zip((a, b), chosen, strict=True) if k is None]
        if len(first) == 2 or any(not _may_be_either(single) for single in first):
            return False
    return True


def _index(single: NDArray[np.float32], masks: NDArray[np.float32]) -> int | None:
    """Which of the three masks a single one is; ``None`` for the first of the four."""
    errors = [float(np.abs(single - mask).max()) for mask in masks]
    nearest = int(np.argmin(errors))
    return nearest if errors[nearest] <= LIMITS["logits"] else None


def _may_be_either(logits: NDArray[np.float32]) -> bool:
    """Whether the stability is over or under its threshold within the tolerance of logits."""
    slack = LIMITS["logits"]
    least, most = (
        (logits > 0.05 + sign * slack).sum() / max((logits > -0.05 - sign * slack).sum(), 1)
        for sign in (1, -1)
    )
    return bool(least <= 0.98 <= most)


def compare(bundle: Path, checkpoint: Path, cases: int, images: int, seed: int) -> dict[str, Any]:
    """Run all cases both ways, and report the largest differences and the disagreements."""
    from sam3rt_bench.pytorch_backend import PyTorchBackend

    ours = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu")
    theirs = sam3rt.SegmentationModel(
        ours.bundle,
        PyTorchBackend(ours.bundle, checkpoint, precision="fp32", device="cpu", threads=None),
    )
    # Without hole filling: it would turn a pixel that hangs by a hair into hundreds.
    predictors = [
        sam3rt.SAM3InteractiveImagePredictor(model, max_hole_area=0.0) for model in (ours, theirs)
    ]
    rng = np.random.default_rng(seed)
    worst = dict.fromkeys(LIMITS, 0.0)
    disagreements: list[dict[str, Any]] = []
    ties: list[dict[str, Any]] = []
    tied_pixels = 0
    start = time.monotonic()
    done = 0
    for number in range(images):
        image = random_image(rng)
        for predictor in predictors:
            predictor.set_image(image)
        maps = [model.encode(image).numpy() for model in (ours, theirs)] if number % 10 == 0 else []
        if maps:
            error = max(float(np.abs(maps[0][name] - maps[1][name]).max()) for name in maps[0])
            worst["features"] = max(worst["features"], error)
        earlier: list[NDArray[np.float32]] = []
        while done * images < cases * (number + 1):
            prompts = random_prompts(rng, image.shape[0], image.shape[1], earlier)
            multimask = bool(rng.integers(2))
            found = [
                p.predict(**prompts, multimask_output=multimask, return_logits=True)
                for p in predictors
            ]
            errors, tied = differences(found[0], found[1])
            tied_pixels += tied
            case = {"case": done, "image": number, **errors}
            if all(errors[name] <= LIMITS[name] for name in errors):
                worst |= {name: max(worst[name], error) for name, error in errors.items()}
            elif not multimask and is_tie(
                *found, predictors[1].predict(**prompts, return_logits=True)
            ):
                ties.append(case)
            else:
                disagreements.append(case)
            low_res = found[1][2]
            earlier = [*earlier[-4:], low_res.reshape(-1, *low_res.shape[-2:])[:1]]
            done += 1
    if not worst["features"] <= LIMITS["features"]:
        disagreements.append({"features": worst["features"]})
    return {
        "cases": done,
        "images": images,
        "limits": LIMITS,
        "worst_of_those_that_agree": worst,
        "disagreements": disagreements,
        "choices_tied": ties,
        "pixels_tied": tied_pixels,
        "seconds": round(time.monotonic() - start, 1),
    }


def make_model(folder: Path) -> tuple[Path, Path]:
    """The small synthetic SAM 3 as a checkpoint and a bundle."""
    import torch
    from tests.support.export_helpers import small_tensors

    from sam3rt_export import export_bundle

    checkpoint = folder / "sam3_small.pt"
    torch.save(small_tensors(), checkpoint)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle", checkpoint


def main() -> int:
    """Run, print and write the result."""
    parser = script_parser(__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle, checkpoint = options.bundle, options.checkpoint
        if bundle is None or checkpoint is None:
            bundle, checkpoint = make_model(Path(folder))
        result = compare(bundle, checkpoint, options.cases, options.images, options.seed)
    publish(conditions("onnxruntime", "torch", "transformers") | result, options.output)
    return int(bool(result["disagreements"]))


if __name__ == "__main__":
    sys.exit(main())
