"""One call of ``predict``, the C++ runtime against the Python runtime, in one process.

Both run the same bundle on ONNX Runtime with the same number of threads, have the same image set,
and answer the same prompts in turn; the C++ library is called through its C interface. Then, in
processes of their own, how long each takes from a loaded library to the first mask of an embedding
on disk, and whether the encoder was loaded. Needs a build of ``make test-cpp``; run from the
repository's root:

    python -m benchmarks.cpp_vs_python BUNDLE --builds build-cpp \\
        --output benchmarks/results/NAME/cpp_vs_python.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser
from tests.support.c_library import Library, PredictOptions, image, prompts

import sam3rt
from sam3rt_bench.scene import FULL_HD, click, draw_scene, requests
from sam3rt_bench.starts import peak_host_mb
from sam3rt_bench.timing import Effort, alternate


def client(kind: str, bundle: Path, builds: Path, embedding: Path, threads: int) -> None:
    """A process that serves one mask from an embedding on disk; prints what it took."""
    if kind == "cpp":
        library = Library(builds)
    start = time.perf_counter()
    if kind == "cpp":
        model = library.load(bundle, threads=threads, skip_file_checks=1)
        loaded = library.make("embedding_load", model, str(embedding).encode())
        predictor = library.predictor(model)
        library.call("predictor_set_embedding", predictor, loaded)
        shape = library.predict(predictor, click(FULL_HD).arguments())[0].shape
        encoder = bool(library.c.sam3rt_model_encoder_loaded(model))
    else:
        served = sam3rt.load_model(
            bundle, backend="onnxruntime", device="cpu", threads=threads, check_files=False
        )
        own = sam3rt.SAM3InteractiveImagePredictor(served, mask_dtype=np.uint8)
        own.set_embedding(served.load_embedding(embedding))
        shape = own.predict(**click(FULL_HD).arguments())[0].shape
        encoder = served.backend._encoder.is_made  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "first_mask_ms": round(1e3 * seconds, 1),
                "peak_mb": peak_host_mb(),
                "encoder_loaded": encoder,
                "mask_shape": list(shape),
            }
        )
    )


def run_client(kind: str, options: argparse.Namespace, embedding: Path) -> dict[str, Any]:
    """Run :func:`client` in a new process."""
    command = [sys.executable, "-m", "benchmarks.cpp_vs_python", options.bundle]
    command += ["--builds", options.builds, "--threads", options.threads]
    command += ["--client", kind, "--embedding", embedding]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


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
    parser.add_argument("--clients", type=int, default=5, help="processes of each kind")
    parser.add_argument("--client", choices=["cpp", "python"], help=argparse.SUPPRESS)
    parser.add_argument("--embedding", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.builds = options.builds.resolve()
    if options.client:
        client(options.client, options.bundle, options.builds, options.embedding, options.threads)
        return
    library = Library(options.builds)
    rows = compare_predict(library, options)
    clients: dict[str, Any] = {"cpp": [], "python": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.embedding"
        model = library.load(options.bundle, threads=options.threads, skip_file_checks=1)
        pixels = draw_scene(*FULL_HD)
        start = time.perf_counter()
        made = library.make("model_encode", model, ctypes.byref(image(pixels)))
        encode_ms = round(1e3 * (time.perf_counter() - start), 1)
        library.call("embedding_save", made, str(path).encode())
        for _ in range(options.clients):
            for kind, found in clients.items():
                found.append(run_client(kind, options, path))
    publish(
        {
            **conditions("onnxruntime"),
            "bundle": sam3rt.open_bundle(options.bundle, check_files=False).manifest.name,
            "image": FULL_HD,
            "median_ratio": statistics.median(row["ratio"] for row in rows),
            "predict": rows,
            "first_encode_with_loading_ms": encode_ms,
            "embedding_clients": clients,
        },
        options.output,
    )


if __name__ == "__main__":
    main()
