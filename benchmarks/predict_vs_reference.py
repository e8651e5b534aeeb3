"""``predict`` of this runtime against SAM 3's own predictor, in one process.

    python -m benchmarks.predict_vs_reference BUNDLE CHECKPOINT [--with-encoder] \\
        --output benchmarks/results/NAME/predict_vs_reference.json

CHECKPOINT is a ``sam3.pt`` and BUNDLE its export. Both runtimes have the same decoder weights and
the same features of one image, and answer the same prompts in turn, so that drift of the machine
hits both alike. Several ways of running the bundle can be compared at once:
``--candidate openvino:fp32 --candidate onnxruntime:fp32``.

With ``--with-encoder`` the reference encodes the image itself, so that whole models are compared;
this takes a checkpoint of the published size, about 12 GB of memory and a few minutes on a CPU.

Needs ``pip install sam3==0.1.4 psutil decord scikit-image`` beside the export's extra; run it from
the repository's root. The reference asks for CUDA in places; on a machine without it, its tensors
are made on the CPU instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from benchmarks.report import conditions, publish, script_parser
from numpy.typing import NDArray

import sam3rt
from sam3rt.accuracy.metrics import mask_ious
from sam3rt_bench.scene import FULL_HD, draw_scene, requests
from sam3rt_bench.timing import Effort, alternate

# Parameters that neither predictor uses.
_UNUSED = ("sam2_convs.3.", "backbone.vision_backbone.convs.", "freqs_cis")


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


def reference_predictor(checkpoint: Path, with_encoder: bool) -> Any:
    """The reference's predictor in FP32, with its decoder or with its whole model."""
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

        tracker = build_tracker(apply_temporal_disambiguation=False, with_backbone=with_encoder)
    prefixes = {"tracker.": ""} | ({"detector.backbone.": "backbone."} if with_encoder else {})
    own = {
        new + name[len(old) :]: tensor
        for name, tensor in torch.load(checkpoint, weights_only=True, mmap=True).items()
        for old, new in prefixes.items()
        if name.startswith(old)
    }
    report = tracker.load_state_dict(own, strict=False)
    missing = [k for k in report.missing_keys if not any(part in k for part in _UNUSED)]
    if with_encoder and missing:
        raise SystemExit(f"the reference misses {missing[:5]}")
    return SAM3InteractiveImagePredictor(tracker.float().eval())


def give_features(reference: Any, embedding: sam3rt.ImageEmbedding) -> None:
    """Set the reference's image by its features."""
    maps = [torch.from_numpy(array) for array in embedding.numpy().values()]
    reference._features = {"image_embed": maps[-1], "high_res_feats": maps[:-1]}
    reference._orig_hw = [embedding.original_size]
    reference._is_image_set = True


def encode_both(
    reference: Any, embedding: sam3rt.ImageEmbedding, image: NDArray[np.uint8]
) -> dict[str, float]:
    """Set the reference's image by its own encoder, and say how far the embeddings are apart."""
    start = time.perf_counter()
    # The reference's package switches a global bf16 autocast on; this is to be FP32.
    with torch.autocast("cpu", enabled=False):
        reference.set_image(image)
    seconds = time.perf_counter() - start
    theirs = reference.get_image_embedding().numpy()
    ours = list(embedding.numpy().values())[-1]
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_value": float(np.abs(theirs).max()),
        "reference_seconds": round(seconds, 2),
    }


def compare(
    reference: Any, ours: dict[str, sam3rt.SAM3InteractiveImagePredictor], repetitions: int
) -> Iterator[dict[str, Any]]:
    """Time and compare every prompt; one row a candidate."""
    for request in requests(FULL_HD):
        arguments = {
            key: np.array(value) if isinstance(value, list) else value
            for key, value in request.arguments().items()
        }
        expected = reference.predict(**arguments)
        calls = {name: partial(p.predict, **arguments) for name, p in ours.items()}
        calls["reference"] = partial(reference.predict, **arguments)
        times = alternate(calls, Effort(repetitions, float("inf"), 3))
        short = {
            name: {"median_ms": t.median_ms, "p95_ms": t.p95_ms, "min_ms": t.min_ms}
            for name, t in times.items()
        }
        for name, predictor in ours.items():
            masks, iou, low_res = predictor.predict(**arguments)
            yield {
                "prompt": request.name,
                "max_hole_area": predictor.max_hole_area,
                "candidate": name,
                "sam3rt": short[name],
                "reference": short["reference"],
                "ratio": round(times["reference"].median_ms / times[name].median_ms, 2),
                "mask_iou": round(float(mask_ious(masks, expected[0] > 0).mean()), 5),
                "differing_mask_pixels": float((masks != expected[0]).mean()),
                "largest_iou_difference": float(np.abs(iou - expected[1]).max()),
                "largest_logit_difference": float(np.abs(low_res - expected[2]).max()),
                "largest_logit": float(np.abs(expected[2]).max()),
            }


def main() -> None:
    """Measure and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--with-encoder", action="store_true")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--candidate", action="append", default=[], metavar="BACKEND:PRECISION")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Without SciPy or scikit-image the reference warns and fills no holes, which would compare
    # different things.
    warnings.filterwarnings("error", message="(?s).*Skipping the post-processing")
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
    # One encoder for all, in FP32 where there is a choice: what is compared are the decoders.
    exact = next((m for n, m in models.items() if n.endswith("fp32")), models[names[0]])
    image = draw_scene(*FULL_HD)
    embedding = exact.encode(image)
    reference = reference_predictor(options.checkpoint, options.with_encoder)
    facts: dict[str, Any] = {}
    if options.with_encoder:
        facts["image_embedding"] = encode_both(reference, embedding, image)
    else:
        give_features(reference, embedding)
    rows = []
    for holes in (0.0, 256.0):
        reference._transforms.max_hole_area = holes
        ours = {}
        for name, model in models.items():
            ours[name] = sam3rt.SAM3InteractiveImagePredictor(model, max_hole_area=holes)
            features = model.backend.upload(list(embedding.numpy().values()))
            ours[name].set_embedding(dataclasses.replace(embedding, features=features))
        for row in compare(reference, ours, options.repetitions):
            print(json.dumps(row), flush=True)
            rows.append(row)
    document = conditions("onnxruntime", "torch", "numpy", "sam3")
    for model in models.values():
        document["versions"] |= model.backend.versions()
    publish({**document, "threads": options.threads, **facts, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
