"""Where OpenVINO's time goes in a graph, operator by operator.

    PYTHONPATH=runtime python benchmarks/profile_openvino.py BUNDLE [--graph encoder] \\
        [--precision bf16-encoder] [--threads 2] [--module 'blocks\\.4\\.']

Runs one image, or one click, a few times with OpenVINO's own counters (PERF_COUNT) and prints what
the last run spent by kind of operator and kernel, and in the operators that took most or whose
names match.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from sam3rt.backends.openvino.backend import _RECIPES, _Graphs
from sam3rt.bundle import open_bundle
from sam3rt.geometry import geometry
from sam3rt.prompts import Prompts, pack

RUNS = 3


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graph", choices=("encoder", "decoder"), default="encoder")
    parser.add_argument("--precision", choices=list(_RECIPES), default="bf16-encoder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--module", type=re.compile, help="names of the operators to list")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle, check_files=False)
    manifest = bundle.manifest
    core = ov.Core()
    core.set_property("CPU", {"PERF_COUNT": True})
    # Below the backend, which keeps its requests, and the gate, which a profile does not need.
    graphs = _Graphs(core, bundle, options.precision, options.threads)
    rng = np.random.default_rng(0)
    if options.graph == "encoder":
        pixels = rng.standard_normal((1, 3, *manifest.image.size), dtype=np.float32)
        compiled, run = graphs._encoder(), lambda: graphs.encode(pixels)
    else:
        shapes = [spec.shape for spec in manifest.encoder.outputs]
        maps = [rng.standard_normal((1, *shape[1:]), dtype=np.float32) for shape in shapes]
        features = graphs.upload(maps)
        place = geometry(manifest.image, (480, 640))
        prompts = pack(Prompts([[300, 200]], [1]), manifest.prompts, place)
        names = ("pred_masks", "iou_scores")
        compiled, run = graphs._decoder(), lambda: graphs.decode(features, prompts, names)
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        print(f"{1e3 * (time.perf_counter() - start):.1f} ms")
    with compiled.request() as request:
        print_operators(request.profiling_info, options.rows, options.module)


def print_operators(counters: list[Any], rows: int, module: re.Pattern[str] | None) -> None:
    """Print sums by kind of operator and kernel, then single operators."""
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for counter in counters:
        kind = (counter.node_type, counter.exec_type)
        spent[kind].append(1e3 * counter.real_time.total_seconds())
    for (name, kernel), times in sorted(spent.items(), key=lambda e: -sum(e[1]))[:rows]:
        print(f"{sum(times):9.2f} ms  {len(times):4d} x  {name:16s} {kernel}")
    print()
    listed = [c for c in counters if module is not None and module.search(c.node_name)]
    if module is None:
        listed = sorted(counters, key=lambda c: c.real_time, reverse=True)[:rows]
    for counter in listed:
        milliseconds = 1e3 * counter.real_time.total_seconds()
        print(f"{milliseconds:9.2f} ms  {counter.node_name}  {counter.node_type}")


if __name__ == "__main__":
    main()
