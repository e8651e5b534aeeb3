"""A whole bundle against SAM 3's own predictor: the same checkpoint, image and prompts.

    PYTHONPATH=runtime python benchmarks/compare_with_reference.py BUNDLE CHECKPOINT [--output FILE]

CHECKPOINT is a ``sam3.pt`` of the published size and BUNDLE its export. Needs the packages that
predict_vs_reference.py names, about 12 GB of memory and a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.predict_vs_reference import PROMPTS, factories_on_the_cpu
from benchmarks.report import cpu_name, publish

import sam3rt

HEIGHT, WIDTH = 1080, 1920


def reference_predictor(checkpoint: Path) -> Any:
    """The reference's predictor with its image encoder, in FP32."""
    with factories_on_the_cpu():
        from sam3.model.sam1_task_predictor import SAM3InteractiveImagePredictor
        from sam3.model_builder import build_tracker

        tracker = build_tracker(apply_temporal_disambiguation=False, with_backbone=True)
    weights = torch.load(checkpoint, weights_only=True, mmap=True)
    prefixes = {"detector.backbone.": "backbone.", "tracker.": ""}
    own = {
        new + name[len(old) :]: tensor
        for name, tensor in weights.items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    report = tracker.load_state_dict(own, strict=False)
    unused = ("sam2_convs.3.", "backbone.vision_backbone.convs.", "freqs_cis")
    missing = [k for k in report.missing_keys if not any(part in k for part in unused)]
    if missing:
        raise SystemExit(f"the reference misses {missing[:5]}")
    return SAM3InteractiveImagePredictor(tracker.float().eval())


def scene() -> np.ndarray:
    """Smooth blobs of colour with texture, uint8 [1080, 1920, 3]."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH] / HEIGHT
    canvas = 40.0 * rng.standard_normal((HEIGHT, WIDTH, 3)) / 4
    for _ in range(12):
        distance = np.hypot(x - rng.uniform(0, 1.8), y - rng.uniform(0, 1)) / rng.uniform(0.1, 0.4)
        canvas += np.exp(-(distance**2))[..., None] * rng.uniform(-120, 120, 3)
    return np.clip(canvas + 128, 0, 255).astype(np.uint8)


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    image = scene()
    theirs = reference_predictor(options.checkpoint)
    start = time.perf_counter()
    # The reference's package switches a global bf16 autocast on; this is to be FP32.
    with torch.autocast("cpu", enabled=False):
        theirs.set_image(image)
    seconds = {"reference set_image": round(time.perf_counter() - start, 2)}
    ours = sam3rt.SAM3InteractiveImagePredictor(sam3rt.load_model(options.bundle, device="cpu"))
    ours.model.backend.prepare()
    start = time.perf_counter()
    ours.set_image(image)
    seconds["sam3rt set_image"] = round(time.perf_counter() - start, 2)
    expected = theirs.get_image_embedding().numpy()
    embedding = ours.get_image_embedding()
    rows = []
    for name, prompts in PROMPTS.items():
        arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in prompts.items()}
        a, b = ours.predict(**arrays), theirs.predict(**arrays)
        rows.append(
            {
                "prompt": name,
                "differing_mask_pixels": float((a[0] != b[0]).mean(axis=(-2, -1)).max()),
                "iou": float(np.abs(a[1] - b[1]).max()),
                "logits": float(np.abs(a[2] - b[2]).max()),
                "largest_logit": float(np.abs(b[2]).max()),
            }
        )
    document = {
        "command": "python benchmarks/compare_with_reference.py BUNDLE CHECKPOINT",
        "machine": {"processor": cpu_name(), "platform": platform.platform()},
        "versions": {"sam3rt": sam3rt.__version__, "torch": torch.__version__},
        "image_embedding": {
            "largest_difference": float(np.abs(embedding - expected).max()),
            "largest_value": float(np.abs(expected).max()),
        },
        "seconds": seconds,
        "rows": rows,
    }
    publish(document, options.output)


if __name__ == "__main__":
    main()
