"""One call of ``predict``, this runtime against SAM 3's own predictor, in one process.

Both get the same decoder weights (synthetic, of the published decoder's size) and the same
features of one image, and answer the same prompts in turn, so that drift of the machine hits both
alike. Needs ``pip install sam3==0.1.4 psutil decord scikit-image onnxruntime`` and the exported
small model of the tests; run from the repository's root:

    PYTHONPATH=runtime python benchmarks/predict_vs_reference.py BUNDLE CHECKPOINT \\
        --output benchmarks/results/NAME/predict_vs_reference.json

BUNDLE is an export of CHECKPOINT, a ``sam3.pt``-style file. The reference asks for CUDA in
places; on a machine without it, its tensors are made on the CPU instead. Several ways of running
the bundle can be compared at once: ``--candidate openvino:fp32 --candidate onnxruntime:fp32``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from benchmarks.predict_calls import HEIGHT, PROMPTS, WIDTH, measure
from benchmarks.report import cpu_name, publish

import sam3rt
from sam3rt.geometry import ImageGeometry


@contextlib.contextmanager
def factories_on_the_cpu() -> Iterator[None]:
    """Let code that says ``device="cuda"`` make its tensors on the CPU."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if str(options.get("device", "")).startswith("cuda"):
                options["device"] = "cpu"
            return function(*arguments, **options)

        return call

    names = ("zeros", "ones", "empty", "arange", "tensor", "full", "rand", "randn", "linspace")
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for name in names:
                stack.enter_context(mock.patch.object(torch, name, wrapped(getattr(torch, name))))
        yield


def reference_predictor(checkpoint: Path, embedding: sam3rt.ImageEmbedding) -> Any:
    """The reference's predictor with the checkpoint's decoder and the given features."""
    # Beside another build of PyTorch, torchvision's wheel lacks these. Nothing here uses them.
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
    with factories_on_the_cpu():
        from sam3.model.sam1_task_predictor import SAM3InteractiveImagePredictor
        from sam3.model_builder import build_tracker

        tracker = build_tracker(apply_temporal_disambiguation=False, with_backbone=False)
    weights = torch.load(checkpoint, weights_only=True)
    prefix = "tracker."
    own = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    tracker.load_state_dict(own, strict=False)
    tracker.float().eval()
    predictor = SAM3InteractiveImagePredictor(tracker)
    maps = [torch.from_numpy(array) for array in embedding.numpy().values()]
    predictor._features = {"image_embed": maps[-1], "high_res_feats": maps[:-1]}
    predictor._orig_hw = [embedding.original_size]
    predictor._is_image_set = True
    return predictor


def mask_iou(actual: np.ndarray, expected: np.ndarray) -> float:
    """The mean IoU of masks [..., H, W]."""
    both = (actual & expected).sum(axis=(-2, -1))
    either = (actual | expected).sum(axis=(-2, -1))
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidate", action="append", default=[], metavar="BACKEND:PRECISION")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = options.candidate or ["onnxruntime:fp32"]
    models = {
        name: sam3rt.load_model(
            options.bundle,
            backend=name.partition(":")[0],
            precision=name.partition(":")[2] or "auto",
            threads=options.threads,
            device="cpu",
        )
        for name in names
    }
    rng = np.random.default_rng(0)
    # One encoder for all, in FP32 where there is a choice: what is compared are the decoders.
    exact = next((m for n, m in models.items() if n.endswith("fp32")), models[names[0]])
    embedding = exact.encode(rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    assert embedding.geometry == ImageGeometry((HEIGHT, WIDTH), exact.manifest.image.size)
    maps = list(embedding.numpy().values())

    rows = []
    for holes in (0.0, 256.0):
        ours = {}
        for name, model in models.items():
            ours[name] = sam3rt.SAM3InteractiveImagePredictor(model, max_hole_area=holes)
            features = model.backend.upload(maps)
            ours[name].set_embedding(dataclasses.replace(embedding, features=features))
        theirs = reference_predictor(options.checkpoint, embedding)
        theirs._transforms.max_hole_area = holes
        for prompt, prompts in PROMPTS.items():
            arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in prompts.items()}
            expected = theirs.predict(**arrays)
            times = measure(
                {
                    **{name: partial(p.predict, **arrays) for name, p in ours.items()},
                    "reference": partial(theirs.predict, **arrays),
                },
                options.repetitions,
            )
            for name, predictor in ours.items():
                masks, _, low_res = predictor.predict(**arrays)
                rows.append(
                    {
                        "prompt": prompt,
                        "max_hole_area": holes,
                        "candidate": name,
                        "sam3rt": times[name],
                        "reference": times["reference"],
                        "ratio": round(
                            times["reference"]["median_ms"] / times[name]["median_ms"], 2
                        ),
                        "mask_iou": round(mask_iou(masks > 0, expected[0] > 0), 5),
                        "differing_mask_pixels": float((masks != expected[0]).mean()),
                        "largest_logit_difference": float(np.abs(low_res - expected[2]).max()),
                    }
                )
                print(json.dumps(rows[-1]))
    if options.output:
        document = {
            "what": f"predict at {WIDTH}x{HEIGHT}, features given, {options.threads} threads",
            "command": "python benchmarks/predict_vs_reference.py BUNDLE CHECKPOINT "
            f"--threads {options.threads} --repetitions {options.repetitions} "
            + " ".join(f"--candidate {name}" for name in names),
            "machine": {"processor": cpu_name(), "platform": platform.platform()},
            "versions": {
                "sam3rt": sam3rt.__version__,
                **{
                    k: v
                    for m in models.values()
                    for k, v in m.backend.versions().items()
                    if k != "precision"
                },
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "rows": rows,
        }
        publish(document, options.output)


if __name__ == "__main__":
    main()
