"""What more objects cost the decoder, in one call and in many.

    python -m benchmarks.decoder BUNDLE [--objects 1 16 64] [--rounds 9] [--memory] [--threads 1]
        [--output FILE]

Random feature maps, one box an object, three masks each, on every backend for the CPU, one thread:
what so many objects take in one call and in calls of their own, on one image and on images of their
own, each in turn in every round; :func:`together` says what the rows mean. Processor time is
disturbed less by other work on the machine than the clock. With ``--memory``, it is the process's
greatest size during a call, less what its results take. The decoder of the golden data's small
SAM 3 has the published size:

    python -c "import torch; from tests.support.export_helpers import small_tensors;
        torch.save(small_tensors(), 'small.pt')"
    sam3rt export small.pt --output small
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser
from numpy.typing import NDArray

from sam3rt.backends.base import OBJECTS_AT_ONCE, Backend
from sam3rt.backends.create import create_backend
from sam3rt.backends.options import BackendOptions
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.bundle.contract import decoder_outputs
from sam3rt.errors import BackendError
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts

BACKENDS = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))


def random_maps(bundle: Bundle, images: int = 1) -> list[NDArray[np.float32]]:
    """Feature maps about as large as real ones."""
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((images, *map(int, spec.shape[1:])), dtype=np.float32)
        for spec in bundle.manifest.encoder.outputs
    ]


def boxes(bundle: Bundle, objects: int) -> PackedPrompts:
    """One box for each object, as the decoder reads them."""
    side = max(bundle.manifest.image.size)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, side, (objects, 2, 2)).astype(np.float32), axis=1)
    points = np.concatenate([corners, np.zeros((objects, 1, 2), np.float32)], axis=1)
    return PackedPrompts(points, np.tile(np.array([2, 3, -1], np.int64), (objects, 1)), None)


def load(bundle: Bundle, name: str, precision: str, threads: int) -> Backend:
    """A backend as it is, proved or not."""
    unproven = precision if precision == "fp32" else f"{precision}-unproven"
    return create_backend(name, bundle, BackendOptions("cpu", threads, unproven))


def decode_all(
    backend: Backend, calls: Iterable[tuple[Features, PackedPrompts]], outputs: Sequence[str]
) -> tuple[float, float]:
    """Make calls; seconds of the processor's time and of the clock."""
    start, clock = time.process_time(), time.perf_counter()
    for features, prompts in calls:
        backend.decode(features, prompts, outputs)
    return time.process_time() - start, time.perf_counter() - clock


def together(
    bundle: Bundle, counts: list[int], rounds: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of processor time and of the clock of so many objects.

    - ``calls``: a call for each, all on one image that was asked about before;
    - ``one_call``: one call on that image;
    - ``images``: a call for each, on its own image, and ``new_images``: on one that is new;
    - ``joined``: each object has its own image, and as many as a call's share a run; everything
      that follows from the images alone lies there in one piece;
    - ``gather``: only bringing the feature maps into one piece.
    """
    outputs = decoder_outputs(bundle.manifest, multimask_output=True)
    for name, precision in BACKENDS:
        try:
            backend = load(bundle, name, precision, threads)
        except BackendError as error:
            yield {"backend": f"{name} {precision}", "skipped": str(error)}
            continue
        for objects in counts:
            maps, prompts = random_maps(bundle, objects), boxes(bundle, objects)
            singles, groups = prompts.split(1), prompts.split(OBJECTS_AT_ONCE)
            starts = range(0, objects, OBJECTS_AT_ONCE)
            times: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for _ in range(rounds + 1):
                own = [backend.upload([m[i : i + 1] for m in maps]) for i in range(objects)]
                pairs = list(zip(own, singles, strict=True))
                times["new_images"].append(decode_all(backend, pairs, outputs))
                times["images"].append(decode_all(backend, pairs, outputs))
                on_one = [(own[-1], one) for one in singles]
                times["calls"].append(decode_all(backend, on_one, outputs))
                times["one_call"].append(decode_all(backend, [(own[-1], prompts)], outputs))
                start, clock = time.process_time(), time.perf_counter()
                joined = [
                    backend.upload([m[i : i + OBJECTS_AT_ONCE] for m in maps]) for i in starts
                ]
                times["gather"].append((time.process_time() - start, time.perf_counter() - clock))
                pairs = list(zip(joined, groups, strict=True))
                decode_all(backend, pairs, outputs)
                times["joined"].append(decode_all(backend, pairs, outputs))
            row: dict[str, Any] = {"backend": f"{name} {precision}", "objects": objects}
            row["threads"] = threads
            for what, spent in times.items():
                # The first round compiles kernels and takes memory.
                cpu, clock = (statistics.median(1e3 * s[i] for s in spent[1:]) for i in range(2))
                row[what] = {"cpu_ms": round(cpu, 1), "clock_ms": round(clock, 1)}
            yield row


def memory(bundle: Bundle, counts: list[int], threads: int) -> Iterator[dict[str, Any]]:
    """Megabytes of a process for each backend, in calls of growing size; Linux alone says."""
    for name, precision in BACKENDS:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            work = pool.submit(memory_of, bundle.path, name, precision, sorted(counts), threads)
            try:
                yield from work.result()
            except BackendError as error:
                yield {"backend": f"{name} {precision}", "skipped": str(error)}


def memory_of(
    path: Path, name: str, precision: str, counts: list[int], threads: int
) -> list[dict[str, Any]]:
    """The rows of one backend, in a process of its own."""
    bundle = open_bundle(path)
    outputs = decoder_outputs(bundle.manifest, multimask_output=True)
    backend = load(bundle, name, precision, threads)
    features = backend.upload(random_maps(bundle))
    rows = []
    for objects in counts:
        prompts = boxes(bundle, objects)
        backend.decode(features, boxes(bundle, min(objects, OBJECTS_AT_ONCE)), outputs)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the greatest size so far
        results = sum(array.nbytes for array in backend.decode(features, prompts, outputs))
        (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
        row = {"backend": f"{name} {precision}", "objects": objects}
        beside = 1024 * int(line.split()[1]) - results
        rows.append(row | {"results_mb": round(results / 1e6), "beside_mb": round(beside / 1e6)})
    return rows


def main() -> None:
    """Measure and publish."""
    parser = script_parser(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--objects", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    if options.memory:
        rows = memory(bundle, options.objects, options.threads)
    else:
        rows = together(bundle, options.objects, options.rounds, options.threads)
    publish(conditions("onnxruntime", "openvino") | {"rows": list(rows)}, options.output)


if __name__ == "__main__":
    main()
