"""Sixteen threads over one model: is every result bit for bit that of a single thread?

    python -m benchmarks.hardening.concurrency [--calls 4000] [--workers 16] [--threads N]

Each thread has its own predictor and sets images of its own between its predictions, so that
encoder and decoder runs of different images meet. Every result is compared with the one computed
before by a single thread: masks, scores, low-resolution logits and embeddings. Exits with 1 where
one differs in a bit.
"""

from __future__ import annotations

import hashlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.hardening.soak import calls
from benchmarks.report import conditions, publish, script_parser
from numpy.typing import NDArray

import sam3rt

_SIZES = ((48, 64), (300, 451), (200, 100), (333, 222))


def digest(*arrays: Any) -> str:
    """A digest of shapes, types and bits."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def pictures() -> list[NDArray[np.uint8]]:
    """Images of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in _SIZES]


def work(
    model: sam3rt.SegmentationModel, seed: int, count: int, calls_per_image: int
) -> list[tuple[str, str]]:
    """One thread's calls: what was asked and a digest of the answer."""
    rng = np.random.default_rng(seed)
    images = pictures()
    low_res = np.zeros((1, *model.manifest.prompts.mask_size), np.float32)
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    answers = []
    for number in range(count):
        if number % calls_per_image == 0:
            which = int(rng.integers(len(images)))
            picture = images[which]
            predictor.set_image(picture)
            answers.append((f"image {which}", digest(predictor.get_image_embedding())))
        kinds = calls(picture.shape[0], picture.shape[1], low_res)
        kind = int(rng.integers(len(kinds)))
        answers.append((f"image {which} call {kind}", digest(*predictor.predict(**kinds[kind]))))
    return answers


def expected(model: sam3rt.SegmentationModel) -> dict[str, str]:
    """Every possible answer, computed by one thread."""
    low_res = np.zeros((1, *model.manifest.prompts.mask_size), np.float32)
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    answers = {}
    for which, picture in enumerate(pictures()):
        predictor.set_image(picture)
        answers[f"image {which}"] = digest(predictor.get_image_embedding())
        for kind, prompt in enumerate(calls(picture.shape[0], picture.shape[1], low_res)):
            answers[f"image {which} call {kind}"] = digest(*predictor.predict(**prompt))
    return answers


def compare(
    model: sam3rt.SegmentationModel, workers: int, count: int, calls_per_image: int
) -> dict[str, Any]:
    """Run all threads, and count the answers that differ."""
    right = expected(model)
    start = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        share = -(-count // workers)
        jobs = [pool.submit(work, model, seed, share, calls_per_image) for seed in range(workers)]
        answers = [answer for job in jobs for answer in job.result()]
    encodes = sum("call" not in question for question, _ in answers)
    return {
        "workers": workers,
        "predictions": len(answers) - encodes,
        "image_changes": encodes,
        "different_answers_possible": len(right),
        "results_that_differ": sum(right[question] != answer for question, answer in answers),
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    """Run, print and write the result."""
    parser = script_parser(__doc__)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--calls-per-image", type=int, default=10)
    parser.add_argument("--threads", type=int, help="per operator (default: all cores)")
    parser.add_argument("--bundle", type=Path, help="default: the bundled model")
    options = parser.parse_args()
    model = sam3rt.load_model(
        options.bundle, backend="onnxruntime", device="cpu", threads=options.threads
    )
    result = compare(model, options.workers, options.calls, options.calls_per_image)
    publish(
        {
            **conditions("onnxruntime"),
            "model": model.manifest.name,
            "threads_per_operator": options.threads or "all cores",
            **result,
        },
        options.output,
    )
    return int(result["results_that_differ"] > 0)


if __name__ == "__main__":
    sys.exit(main())
