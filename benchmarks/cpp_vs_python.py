"""One call of ``predict``, the C++ runtime against the Python runtime, in one process.

Both run the same bundle on ONNX Runtime with the same number of threads, have the same image set,
and answer the same prompts in turn; the C++ library is called through its C interface. Needs a
build of ``make test-cpp``; run from the repository's root:

    python -m benchmarks.cpp_vs_python BUNDLE --builds build-cpp \\
        --output benchmarks/results/NAME/cpp_vs_python.json
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser
from tests.support.c_library import Library, PredictOptions, prompts

import sam3rt
from sam3rt_bench.scene import FULL_HD, draw_scene, requests
from sam3rt_bench.timing import Effort, alternate


def compare_predict(library: Library, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both runtimes' times for every prompt, with holes filled and not."""
    model = sam3rt.load_model(
        options.bundle, backend="onnxruntime", device="cpu", threads=options.threads
    )
    embedding = model.encode(draw_scene(*FULL_HD))
    handle = library.load(options.bundle, threads=options.threads)
    with tempfile.NamedTemporaryFile() as file:
        embedding.save(file.name)
        same = library.make("embedding_load", handle, file.name.encode())
    rows = []
    for holes in (0.0, 256.0):
        python = sam3rt.SAM3InteractiveImagePredictor(
            model, max_hole_area=holes, mask_dtype=np.uint8
        )
        python.set_embedding(embedding)
        cpp = library.predictor(handle, max_hole_area=holes)
        library.call("predictor_set_embedding", cpp, same)
        for request in requests(FULL_HD):
            call = request.arguments()
            given = prompts(call)
            single = int(not request.multimask)

            def predict_cpp(cpp: Any = cpp, given: Any = given, single: int = single) -> None:
                made = ctypes.c_void_p()
                settings = PredictOptions(ctypes.sizeof(PredictOptions), single, 0)
                library.call(
                    "predictor_predict",
                    cpp,
                    ctypes.byref(given),
                    ctypes.byref(settings),
                    ctypes.byref(made),
                )
                library.c.sam3rt_prediction_free(made)

            def predict_python(python: Any = python, call: Any = call) -> None:
                python.predict(**call)

            mine = library.predict(cpp, call)
            theirs = python.predict(**call)
            calls: dict[str, Callable[[], Any]] = {"cpp": predict_cpp, "python": predict_python}
            times = alternate(calls, Effort(options.repetitions, float("inf"), 3))
            rows.append(
                {
                    "prompt": request.name,
                    "max_hole_area": holes,
                    **{
                        name: {"median_ms": t.median_ms, "p95_ms": t.p95_ms, "min_ms": t.min_ms}
                        for name, t in times.items()
                    },
                    "ratio": round(times["python"].median_ms / times["cpp"].median_ms, 3),
                    "differing_pixels": float((mine[0] != theirs[0]).mean()),
                }
            )
    return rows


def main() -> None:
    """Measure and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--builds", type=Path, default=Path("build-cpp"))
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = compare_predict(Library(options.builds.resolve()), options)
    publish(
        {
            **conditions("onnxruntime"),
            "bundle": sam3rt.open_bundle(options.bundle, check_files=False).manifest.name,
            "image": FULL_HD,
            "median_ratio": statistics.median(row["ratio"] for row in rows),
            "predict": rows,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
