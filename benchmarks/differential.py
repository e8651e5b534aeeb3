"""Random images and prompts by the thousand: ONNX Runtime against the PyTorch modules.

    python benchmarks/differential.py [--cases 3000] [--images 30]

Exports the small synthetic SAM 3 of tests/golden/sam3 (or takes --bundle and --checkpoint) and runs
every case twice: in ONNX Runtime on the bundle, and in PyTorch on the checkpoint it was made from.
A case disagrees where a difference exceeds the tolerances of the golden tests. Exits with 1 where
one does. Needs the export extra.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report import cpu_name, publish

ROOT = Path(__file__).resolve().parents[1]
for folder in ("runtime", "export", "tests/golden/sam3"):
    sys.path.insert(0, str(ROOT / folder))

import sam3rt  # noqa: E402

# Those of tests/test_golden_sam3.py.
LIMITS = {"features": 2e-3, "logits": 5e-3, "iou": 1e-3, "mask_pixels": 2e-4}


def random_image(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Smooth blobs, noise or flat colour, of any shape, uint8 [H, W, 3]."""
    import synthetic

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


def differences(
    ours: tuple[NDArray[Any], ...], theirs: tuple[NDArray[Any], ...]
) -> dict[str, float]:
    """Largest differences of masks, scores and low-resolution logits."""
    if [a.shape for a in ours] != [b.shape for b in theirs]:
        return dict.fromkeys(("logits", "iou", "mask_pixels"), float("inf"))
    return {
        "logits": float(np.abs(ours[2] - theirs[2]).max()),
        "iou": float(np.abs(ours[1] - theirs[1]).max()),
        "mask_pixels": float((ours[0] != theirs[0]).mean(axis=(-2, -1)).max()),
    }


def compare(bundle: Path, checkpoint: Path, cases: int, images: int, seed: int) -> dict[str, Any]:
    """Run all cases both ways, and report the largest differences and the disagreements."""
    from sam3rt_export.pytorch_backend import PyTorchBackend

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
            found = [p.predict(**prompts, multimask_output=multimask) for p in predictors]
            errors = differences(found[0], found[1])
            for name, error in errors.items():
                worst[name] = max(worst[name], error)
            if any(not errors[name] <= LIMITS[name] for name in errors):
                disagreements.append({"case": done, "image": number, **errors})
            low_res = found[1][2]
            earlier = [*earlier[-4:], low_res.reshape(-1, *low_res.shape[-2:])[:1]]
            done += 1
    if not worst["features"] <= LIMITS["features"]:
        disagreements.append({"features": worst["features"]})
    return {
        "cases": done,
        "images": images,
        "limits": LIMITS,
        "worst": worst,
        "disagreements": disagreements,
        "seconds": round(time.monotonic() - start, 1),
    }


def make_model(folder: Path) -> tuple[Path, Path]:
    """The small synthetic SAM 3 as a checkpoint and a bundle."""
    import synthetic
    import torch

    from sam3rt_export import export_bundle

    checkpoint = folder / "sam3_small.pt"
    tensors = {n: torch.from_numpy(np.asarray(a)) for n, a in synthetic.checkpoint().items()}
    torch.save(tensors, checkpoint)
    export_bundle(checkpoint, folder / "bundle")
    return folder / "bundle", checkpoint


def main() -> int:
    """Run, print and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle, checkpoint = options.bundle, options.checkpoint
        if bundle is None or checkpoint is None:
            bundle, checkpoint = make_model(Path(folder))
        result = compare(bundle, checkpoint, options.cases, options.images, options.seed)
    publish(
        {
            "command": f"python benchmarks/differential.py --cases {options.cases} "
            f"--images {options.images} --seed {options.seed}",
            "machine": {"processor": cpu_name(), "platform": platform.platform()},
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("sam3rt", "onnxruntime", "torch", "transformers")
            },
            **result,
        },
        options.output,
    )
    return int(bool(result["disagreements"]))


if __name__ == "__main__":
    sys.exit(main())
