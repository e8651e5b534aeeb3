"""Where the decoder's time goes, and what more objects cost.

    python -m benchmarks.decoder BUNDLE [--objects 1 16 64] [--rounds 9]
        [--operators | --together | --memory] [--threads 1] [--output FILE]

Random feature maps, one box an object, three masks each, on every backend for the CPU, one thread.
What is given is the processor time of calls on one image, which other work on the machine disturbs
less than the clock. With ``--operators``, it is what the libraries' own profilers say of each
operator of the graph as it stands in the bundle, all objects in one run: the least time of any
round, and the bytes read and written. With ``--together``, it is what so many objects take in one
call and in calls of their own, on one image and on images of their own, each in turn in every
round; :func:`together` says what the rows mean. With ``--memory``, it is the process's greatest
size during a call, less what its results take. The decoder of the golden data's small SAM 3 has the
published size:

    python -c "import torch; from tests.golden.sam3 import synthetic as s; torch.save(
        {n: torch.from_numpy(a) for n, a in s.checkpoint().items()}, 'small.pt')"
    sam3rt export small.pt --output small
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import openvino as ov
from benchmarks.report import conditions, publish
from numpy.typing import NDArray

from sam3rt.backends.base import OBJECTS_AT_ONCE, Backend
from sam3rt.backends.create import create_backend
from sam3rt.backends.openvino.bf16 import TOKENS, matmuls_in_bf16
from sam3rt.backends.options import BackendOptions
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.bundle.contract import decoder_outputs
from sam3rt.errors import BackendError
from sam3rt.features import Features
from sam3rt.prompts import PackedPrompts, decoder_inputs

BACKENDS = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
# Of a run's time: what takes less is not listed.
LEAST_SHARE = 0.01


def random_maps(bundle: Bundle, images: int = 1) -> dict[str, NDArray[np.float32]]:
    """Feature maps about as large as real ones, by name."""
    rng = np.random.default_rng(0)
    return {
        spec.name: rng.standard_normal((images, *map(int, spec.shape[1:])), dtype=np.float32)
        for spec in bundle.manifest.encoder.outputs
    }


def boxes(bundle: Bundle, objects: int) -> PackedPrompts:
    """One box for each object, as the decoder reads them."""
    side = max(bundle.manifest.image.size)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, side, (objects, 2, 2)).astype(np.float32), axis=1)
    points = np.concatenate([corners, np.zeros((objects, 1, 2), np.float32)], axis=1)
    return PackedPrompts(points, np.tile(np.array([2, 3, -1], np.int64), (objects, 1)), None)


def backends(bundle: Bundle, threads: int) -> Iterator[tuple[str, Backend | str]]:
    """Each backend for the CPU, or why there is none."""
    for name, precision in BACKENDS:
        try:
            yield f"{name} {precision}", load(bundle, name, precision, threads)
        except BackendError as error:
            yield f"{name} {precision}", str(error)


def load(bundle: Bundle, name: str, precision: str, threads: int) -> Backend:
    """A backend as it is, proved or not."""
    unproven = precision if precision == "fp32" else f"{precision}-unproven"
    return create_backend(name, bundle, BackendOptions("cpu", threads, unproven))


def calls(bundle: Bundle, counts: list[int], rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    """Milliseconds of processor time of a call on an image that was asked about before."""
    outputs = decoder_outputs(bundle.manifest, multimask_output=True)
    for name, backend in backends(bundle, threads):
        if isinstance(backend, str):
            yield {"backend": name, "skipped": backend}
            continue
        features = backend.upload(list(random_maps(bundle).values()))
        for objects in counts:
            prompts, times = boxes(bundle, objects), []
            for _ in range(rounds + 2):
                start = time.process_time()
                backend.decode(features, prompts, outputs)
                times.append(1e3 * (time.process_time() - start))
            yield {
                "backend": name,
                "objects": objects,
                "first_ms": round(times[0], 1),
                "median_ms": round(statistics.median(times[2:]), 1),
                "least_ms": round(min(times[2:]), 1),
            }


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
    for name, backend in backends(bundle, threads):
        if isinstance(backend, str):
            yield {"backend": name, "skipped": backend}
            continue
        for objects in counts:
            maps, prompts = list(random_maps(bundle, objects).values()), boxes(bundle, objects)
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
            row: dict[str, Any] = {"backend": name, "objects": objects, "threads": threads}
            for what, spent in times.items():
                # The first round compiles kernels and takes memory.
                cpu, clock = (statistics.median(1e3 * s[i] for s in spent[1:]) for i in range(2))
                row[what] = {"cpu_ms": round(cpu, 1), "clock_ms": round(clock, 1)}
            yield row


def memory(
    bundle: Bundle, counts: list[int], rounds: int, threads: int
) -> Iterator[dict[str, Any]]:
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
    features = backend.upload(list(random_maps(bundle).values()))
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


def operators(
    bundle: Bundle, counts: list[int], rounds: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Milliseconds of each operator of the decoder, and in ONNX Runtime megabytes moved."""
    path = bundle.file(bundle.manifest.decoder.model)
    no_mask = np.zeros((1, 1, *bundle.manifest.prompts.mask_size), np.float32)
    for objects in counts:
        feed = {**random_maps(bundle), **dict(decoder_inputs(boxes(bundle, objects), no_mask))}
        for name, precision in BACKENDS:
            if name == "onnxruntime":
                seconds, moved = _on_onnxruntime(path, feed, rounds)
            else:
                seconds, moved = _on_openvino(path, feed, rounds, precision), Counter[str]()
            total = sum(seconds.values())
            yield {
                "backend": f"{name} {precision}",
                "objects": objects,
                "ms": round(1e3 * total, 2),
                "megabytes": round(sum(moved.values()) / 1e6, 1) if moved else None,
                "operators": {
                    operator: [round(1e3 * s, 2), round(moved[operator] / 1e6, 1)]
                    if moved
                    else round(1e3 * s, 2)
                    for operator, s in seconds.most_common()
                    if s > LEAST_SHARE * total
                },
            }


def _on_onnxruntime(
    path: Path, feed: dict[str, Any], rounds: int
) -> tuple[Counter[Any], Counter[str]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(rounds + 2):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    seconds: dict[str, float] = {}
    moved: Counter[str] = Counter()
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            name, sizes = event["name"].removesuffix("_kernel_time"), event["args"]
            seconds[name] = min(seconds.get(name, np.inf), event["dur"] / 1e6)
            moved[name] = sum(
                int(sizes[f"{kind}_size"]) for kind in ("activation", "parameter", "output")
            )
    return Counter(seconds), moved


def _on_openvino(path: Path, feed: dict[str, Any], rounds: int, precision: str) -> Counter[Any]:
    model = ov.Core().read_model(path)
    if precision == "bf16":
        matmuls_in_bf16(model, TOKENS)
    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "dynamic",
        "INFERENCE_NUM_THREADS": 1,
        "PERF_COUNT": True,
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    seconds: dict[str, float] = {}
    for _ in range(rounds + 2):
        request.infer(feed)
        for info in request.get_profiling_info():
            spent = info.real_time.total_seconds()
            seconds[info.node_name] = min(seconds.get(info.node_name, np.inf), spent)
    return Counter(seconds)


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--objects", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--operators", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    measure = calls
    for chosen in (operators, together, memory):
        measure = chosen if getattr(options, chosen.__name__) else measure
    bundle = open_bundle(options.bundle)
    rows = list(measure(bundle, options.objects, options.rounds, options.threads))
    publish(conditions("onnxruntime", "openvino") | {"rows": rows}, options.output)


if __name__ == "__main__":
    main()
