"""One process that predicts and changes images for a long time: do memory and latency stay flat?

    python -m benchmarks.hardening.soak [--backend openvino] [--predictions 20000] [--images 500]

Images of many shapes are set in turn and prompted with clicks, boxes, masks and varied numbers of
objects and points. A tenth of a run is warm-up; over the rest, a line is fitted to the resident
memory and to the latency of one kind of call on images of one size. Embeddings are saved and loaded
again on the way. Latency is measured twice: by the clock, which other work on the machine disturbs,
and as the processor time this process used, which says whether it has more to do than before. Exits
with 1 where memory grows by more than 1 MB per 1,000 predictions, or where a click in the second
half takes over a tenth more processor time than in the first.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, resident_mb, script_parser
from numpy.typing import NDArray

import sam3rt
from sam3rt_bench.scene import many_points

# (height, width) of every fifth image; the others have shapes of their own.
_FOLLOWED_SIZE = (240, 320)
_SIDES = (16, 900)
_MOST_OBJECTS = 6
_MOST_POINTS = 40
# 10^6 bytes per 1,000 predictions.
_ALLOWED_GROWTH = 1.0
# Processor time of a click in the second half, over that in the first.
_ALLOWED_SLOWDOWN = 1.1


def open_handles() -> int:
    """Open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


def calls(height: int, width: int, low_res: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Prompts of every kind for an image; the first is the one whose latency is followed."""
    x, y = width / 2, height / 2
    box = [width * 0.2, height * 0.2, width * 0.8, height * 0.8]
    return [
        {"point_coords": [[x, y]], "point_labels": [1]},
        {"box": box},
        {"point_coords": [[x, y], [3, 3]], "point_labels": [1, 0], "multimask_output": False},
        {"box": [box, [0, 0, x, y], [x, y, width, height]]},
        {"point_coords": [[x, y]], "point_labels": [1], "mask_input": low_res},
        {},
    ]


def varied_call(rng: np.random.Generator, size: tuple[int, int]) -> dict[str, Any]:
    """Clicks for a random number of objects, each with a random number of points."""
    objects, points = rng.integers(1, _MOST_OBJECTS + 1), rng.integers(1, _MOST_POINTS + 1)
    prompts = many_points(size, int(objects), int(points))
    return {"point_coords": prompts.point_coords, "point_labels": prompts.point_labels}


def picture(rng: np.random.Generator, number: int) -> NDArray[np.uint8]:
    """One image, uint8 [H, W, 3]; every fifth has the size that is followed."""
    size = _FOLLOWED_SIZE
    if number % 5:
        height, width = np.exp(rng.uniform(*np.log(_SIDES), 2))
        size = (int(height), int(width))
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def slope(x: list[float], y: list[float]) -> float:
    """Rise of the line through the points, by least squares."""
    return float(np.polyfit(x, y, 1)[0])


def trend(samples: list[tuple[int, float]]) -> dict[str, float]:
    """Medians of the halves of (predictions done, milliseconds), and the slope per 1,000."""
    half = len(samples) // 2
    return {
        "median_of_first_half": round(float(np.median([s[1] for s in samples[:half]])), 2),
        "median_of_second_half": round(float(np.median([s[1] for s in samples[half:]])), 2),
        "slope_per_1000_predictions": round(
            1e3 * slope([s[0] for s in samples], [s[1] for s in samples]), 4
        ),
    }


def complaints(result: dict[str, Any]) -> list[str]:
    """What in a result is not flat; empty where everything is."""
    found = []
    growth = result["resident_mb"]["slope_per_1000_predictions"]
    if growth > _ALLOWED_GROWTH:
        found.append(
            f"memory grows by {growth} MB per 1,000 predictions; {_ALLOWED_GROWTH} are allowed"
        )
    spent = result["one_click_processor_ms"]
    ratio = spent["median_of_second_half"] / spent["median_of_first_half"]
    if ratio > _ALLOWED_SLOWDOWN:
        found.append(
            f"a click takes {ratio:.2f} times the processor time in the second half; "
            f"{_ALLOWED_SLOWDOWN} are allowed"
        )
    return found


def run(
    model: sam3rt.SegmentationModel, predictions: int, images: int, embeddings: int
) -> dict[str, Any]:
    """Do it, and say how memory and latency went."""
    predictor = sam3rt.SAM3InteractiveImagePredictor(model, mask_dtype=bool)
    rng = np.random.default_rng(0)
    low_res = np.zeros((1, *model.manifest.prompts.mask_size), np.float32)
    done = saved = 0
    samples: list[tuple[int, float]] = []
    click_ms: list[tuple[int, float]] = []
    spent_ms: list[tuple[int, float]] = []
    set_ms: list[tuple[int, float]] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(images):
            image = picture(rng, number)
            height, width = image.shape[:2]
            begin = time.perf_counter()
            predictor.set_image(image)
            set_ms.append((number, 1e3 * (time.perf_counter() - begin)))
            if saved < embeddings and number * embeddings >= saved * images:
                path = Path(folder) / f"{number % 4}.embedding"
                model.encode(image).save(path)
                predictor.set_embedding(model.load_embedding(path))
                saved += 1
            kinds = calls(height, width, low_res)
            while done * images < predictions * (number + 1):
                # Every second call has another shape.
                kind = done // 2 % len(kinds) if done % 2 == 0 else None
                call = varied_call(rng, (height, width)) if kind is None else kinds[kind]
                begin, spent = time.perf_counter(), time.process_time()
                predictor.predict(**call)
                # Post-processing depends on the image's size: one size is followed.
                if kind == 0 and (height, width) == _FOLLOWED_SIZE:
                    click_ms.append((done, 1e3 * (time.perf_counter() - begin)))
                    spent_ms.append((done, 1e3 * (time.process_time() - spent)))
                done += 1
            samples.append((done, resident_mb()))
            if number % max(1, images // 20) == 0:
                print(f"{done} predictions, {samples[-1][1]:.0f} MB", file=sys.stderr, flush=True)
    after = [s for s in samples if s[0] > 0.1 * predictions]
    growth = 1e3 * slope([s[0] for s in after], [s[1] for s in after])
    late, late_spent = (
        [s for s in times if s[0] > 0.1 * predictions] for times in (click_ms, spent_ms)
    )
    return {
        "predictions": done,
        "image_changes": images,
        "embeddings_saved_and_loaded": saved,
        "seconds": round(time.monotonic() - start, 1),
        "resident_mb": {
            "after_warm_up": round(after[0][1], 1),
            "at_the_end": round(after[-1][1], 1),
            "most": round(max(s[1] for s in samples), 1),
            "slope_per_1000_predictions": round(growth, 4),
        },
        "open_files_at_the_end": open_handles(),
        "clicks_followed": len(late),
        "one_click_ms": trend(late),
        "one_click_processor_ms": trend(late_spent),
        "set_image_ms_median": round(float(np.median([s[1] for s in set_ms])), 1),
        "memory_by_predictions": [[s[0], round(s[1], 1)] for s in samples[:: max(1, images // 50)]],
    }


def main() -> int:
    """Run, print and write the result."""
    parser = script_parser(__doc__)
    parser.add_argument("--backend", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--bundle", type=Path, help="default: the bundled model")
    parser.add_argument("--predictions", type=int, default=20_000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--embeddings", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model = sam3rt.load_model(
        options.bundle,
        backend=options.backend,
        device="cpu",
        precision="fp32",
        threads=options.threads,
    )
    result = run(model, options.predictions, options.images, options.embeddings)
    publish(
        conditions(options.backend, "numpy") | {"model": model.manifest.name} | result,
        options.output,
    )
    found = complaints(result)
    for complaint in found:
        print(complaint, file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
