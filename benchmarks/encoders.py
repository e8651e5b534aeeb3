"""Encoders of several models one after the other: how much less a smaller one costs.

    python -m benchmarks.encoders ENCODER.onnx ENCODER.onnx ... [--rounds 3] [--output FILE]

Each file runs on ONNX Runtime and on OpenVINO in FP32 on one thread, one image a run, after one run
that does not count. Only one is in memory at a time. What is given is processor time, which other
work on the machine disturbs less than the clock; read the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
from benchmarks.report import conditions, publish


def on_onnxruntime(path: Path) -> Callable[[], Any]:
    """One run of an encoder on random pixels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    pixels = random_pixels(given.shape[-1])
    return lambda: session.run(None, {given.name: pixels})


def on_openvino(path: Path) -> Callable[[], Any]:
    """One run of an encoder on random pixels."""
    model = ov.Core().read_model(path)
    side = model.inputs[0].partial_shape[3].get_length()
    model.reshape([1, 3, side, side])
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    pixels = random_pixels(side)
    return lambda: request.infer([pixels])


def timed(run: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Processor time of a run, seconds, after one that does not count."""
    run()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return {"median_seconds": round(statistics.median(times), 3), "least": round(min(times), 3)}


def random_pixels(side: int) -> Any:
    """Pixels about as large as normalized ones, float32 [1, 3, side, side]."""
    return np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("encoders", nargs="+", type=Path, metavar="ENCODER.onnx")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    document = conditions("onnxruntime", "openvino")
    for name, load in (("onnxruntime", on_onnxruntime), ("openvino", on_openvino)):
        document[name] = {
            path.parent.name: timed(load(path), options.rounds) for path in options.encoders
        }
    publish(document, options.output)


if __name__ == "__main__":
    main()
