"""Checkpoints of the published sizes, made from a seed: exported, verified, run.

    python -m benchmarks.checkpoints MODEL ... [--backends NAME ...] [--threads N]
        [--scratch FOLDER] [--output FILE]

A MODEL is ``sam3``, ``sam3.1`` (the same weights under its names), ``sam3@672``, ``sam2.1_small``
(tiny, small, base_plus, large) or an EfficientSAM3 such as ``repvit_m1_1``. Each is written as its
authors write it, exported, and checked by ``sam3rt verify`` on each backend in FP32; then a click
and a box are answered.

Every step is a process of its own, so its peak of memory is its own. Only one bundle lies on the
disk at a time. The result is published after each model; exits with 1 where a model fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser

from sam3rt.bundle import open_bundle

_BACKENDS = ("onnxruntime", "openvino")
_CALLS: dict[str, dict[str, Any]] = {
    "point": {"point_coords": [[320, 240]], "point_labels": [1]},
    "box": {"box": [150, 100, 420, 330], "multimask_output": False},
}


def make(model: str, path: Path) -> dict[str, Any]:
    """Write a checkpoint; what is in it."""
    import torch
    from tests.golden.efficientsam3 import synthetic as efficient_sam3
    from tests.golden.sam2 import synthetic as sam2
    from tests.golden.sam3 import synthetic as sam3
    from tests.support.export_helpers import NECK, USED, as_multiplex

    arrays: dict[str, Any]
    if model.startswith("sam3"):
        arrays = dict(sam3.full_size_checkpoint())
    elif model.startswith("sam2.1_"):
        arrays = dict(sam2.full_size_checkpoint(model.removeprefix("sam2.1_")))
    else:
        arrays = dict(efficient_sam3.checkpoint(model))
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    # The parts that are exported: not the rest of the tracker, and not the neck's fourth level.
    exported = [
        tensor
        for name, tensor in tensors.items()
        if name.startswith((*USED, "image_encoder.", "sam_", "no_mem_embed"))
        and not name.startswith(NECK + "3.")
        and not name.endswith("num_batches_tracked")
    ]
    if model == "sam3.1":
        tensors = as_multiplex(tensors)
    torch.save(tensors if model.startswith("sam2") else {"model": tensors}, path)
    return {
        "tensors": len(tensors),
        "tensors_in_exported_parts": len(exported),
        "values_in_them": sum(tensor.numel() for tensor in exported),
    }


def command(arguments: list[str]) -> dict[str, Any]:
    """A command of ``sam3rt``: its last line, times in seconds and peak of memory in MB."""
    from sam3rt.cli import main
    from sam3rt_bench.starts import peak_host_mb

    start = time.perf_counter()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        status = main(arguments)
    print(shown.getvalue(), end="", file=sys.stderr)
    return {
        "status": status,
        "said": [line.strip() for line in shown.getvalue().splitlines()[1:]],
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time(), 1),
        "peak_mb": peak_host_mb(),
    }


def answers(bundle: Path, threads: int) -> dict[str, Any]:
    """What the predictor answers: masks, scores and low-resolution logits of each call."""
    from tests.golden.efficientsam3 import synthetic

    import sam3rt

    model = sam3rt.load_model(bundle, backend="onnxruntime", device="cpu", threads=threads)
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_image(synthetic.image())
    return {call: predictor.predict(**arguments) for call, arguments in _CALLS.items()}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything about one model."""
    model, _, size = name.partition("@")
    checkpoint, bundle = scratch / f"{model}.pt", scratch / "bundle"
    result: dict[str, Any] = {"checkpoint": apart(make, model, checkpoint)}
    arguments = ["export", str(checkpoint), "--output", str(bundle)]
    arguments += ["--image-size", size] if size else []
    try:
        result["export"] = apart(command, arguments)
        if result["export"]["status"]:
            return result
        checkpoint.unlink()
        files = [f for f in bundle.iterdir() if f.name.startswith("encoder")]
        result["fingerprint"] = open_bundle(bundle, check_files=False).manifest.fingerprint
        result["encoder_mb"] = round(sum(f.stat().st_size for f in files) / 1e6, 1)
        for backend in options.backends:
            verify = ["verify", str(bundle), "--backend", backend, "--device", "cpu"]
            verify += ["--precision", "fp32", "--threads", str(options.threads)]
            result[f"verify {backend}"] = apart(command, verify)
        found = apart(answers, bundle, options.threads)
        result["answers"] = {
            call: {
                "mask_pixels": [int(mask.sum()) for mask in masks],
                "scores": np.round(scores, 6).tolist(),
                "largest_logit": round(float(abs(low_res).max()), 3),
                "finite": bool(np.isfinite(low_res).all()),
            }
            for call, (masks, scores, low_res) in found.items()
        }
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        checkpoint.unlink(missing_ok=True)
    return result


def passes(result: dict[str, Any]) -> bool:
    """Whether a model was exported, verified and answered."""
    return (
        all(part.get("status", 0) == 0 for part in result.values() if isinstance(part, dict))
        and "answers" in result
        and all(call["finite"] for call in result["answers"].values())
    )


def main() -> int:
    """Measure and publish."""
    parser = script_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--backends", nargs="+", choices=_BACKENDS, default=_BACKENDS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="folder for up to 8 GB of files")
    options = parser.parse_args()
    document = conditions("onnxruntime", "openvino", "torch", "transformers")
    models: dict[str, Any] = {}
    document["models"] = models
    for name in options.models:
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            models[name] = measure(name, options, Path(folder))
        models[name]["passes"] = passes(models[name])
        publish(document, options.output)
    return 0 if all(result["passes"] for result in models.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
