"""Where the decoder's time goes on this CPU, operator by operator.

    PYTHONPATH=runtime python benchmarks/profile_decoder.py BUNDLE [--threads 2]

Runs one click through ONNX Runtime with its profiler and prints the median of the whole run and
the operators that take most of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime

from sam3rt.bundle import open_bundle

RUNS = 50


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle, check_files=False)
    rng = np.random.default_rng(0)
    sizes = {"num_objects": 1, "num_points": 2, "num_masks": 1}
    feed = {}
    for spec in bundle.manifest.decoder.inputs:
        shape = [sizes.get(side, side) for side in spec.shape]
        feed[spec.name] = rng.standard_normal(shape).astype(spec.dtype)
    feed["input_points"] = np.float32([[[[400, 300], [0, 0]]]])
    feed["input_labels"] = np.int64([[[1, -1]]])
    feed["has_input_masks"] = np.zeros(1, np.float32)

    for profiled in (False, True):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.enable_profiling = profiled
        settings.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
        path = str(bundle.file(bundle.manifest.decoder.model))
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        if not profiled:
            print(f"median of {RUNS} runs: {1e3 * statistics.median(times):.1f} ms")
            continue
        print_operators(Path(session.end_profiling()), options.rows)


def print_operators(profile: Path, rows: int) -> None:
    """Print the operators that took most, with the shapes they were given."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time"):
            shapes = [next(iter(entry.values())) for entry in event["args"]["input_type_shape"]]
            entry = spent[event["args"]["op_name"], str(shapes)[:80]]
            entry[0] += event["dur"] / RUNS
            entry[1] += 1
    for (name, shapes), (total, count) in sorted(spent.items(), key=lambda e: -e[1][0])[:rows]:
        print(f"{total:8.0f} us  {count // RUNS:3d} x  {name:24s} {shapes}")


if __name__ == "__main__":
    main()
