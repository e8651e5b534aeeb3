"""SAM 3 of the published size with seeded weights, and what it takes in each way to run it."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_sections.record import Record, Settings, device_times, times
from tests.golden.sam3 import synthetic
from tests.support import gpu_checks
from tests.support.torch_lanes import StandInBackend

from sam3rt import GpuOptions, Prompts, SegmentationModel, load_model, open_bundle
from sam3rt.accuracy.gate import judge, limits_for
from sam3rt.accuracy.record import load_record
from sam3rt.accuracy.run import verify
from sam3rt.backends.base import Backend
from sam3rt.backends.onnxruntime.backend import OnnxRuntimeBackend
from sam3rt.backends.onnxruntime.lanes import OnnxRuntimeLanes
from sam3rt.backends.onnxruntime.typed import TYPED_ORDER, Graphs, find_typed, typed_folder
from sam3rt.backends.tensorrt.backend import LaneBackend
from sam3rt.geometry import preprocess
from sam3rt.masks import MaskOptions
from sam3rt_bench.pytorch_backend import PyTorchBackend
from sam3rt_bench.timing import Effort, alternate, timed
from sam3rt_build.ort_graphs import build_typed_graphs
from sam3rt_export import export_bundle

_BATCHES = (1, 2, 4)
# Calls that a profile is the mean of, and the kernels that are shown of it.
_PROFILED, _KERNELS = 5, 30


def make(record: Record, settings: Settings) -> None:
    """Make checkpoint and bundle, unless they are there, and the typed graphs that come first."""
    begun = time.monotonic()
    if not settings.checkpoint.is_file():
        if settings.small:
            from tests.support.export_helpers import tiny_tensors

            tensors = dict(tiny_tensors())
        else:
            tensors = {
                name: torch.from_numpy(np.asarray(array))
                for name, array in synthetic.full_size_checkpoint()
            }
        torch.save(tensors, settings.checkpoint)
        record.put("parameters", sum(tensor.numel() for tensor in tensors.values()))
        del tensors
        record.put("checkpoint, seconds", time.monotonic() - begun)
    if not settings.bundle.is_dir():
        begun = time.monotonic()
        stages: list[str] = []

        def say(line: str) -> None:
            stages.append(line)
            record.put("export", stages)

        export_bundle(settings.checkpoint, settings.bundle, progress=say)
        record.put("export, seconds", time.monotonic() - begun)
    begun = time.monotonic()
    shutil.rmtree(settings.bundle / "engines", ignore_errors=True)
    lines: list[str] = []
    build_typed_graphs(open_bundle(settings.bundle), TYPED_ORDER[:1], lines.append)
    record.put("typed graphs", lines)
    record.put("typed graphs, seconds", time.monotonic() - begun)


def onnxruntime(record: Record, settings: Settings, precision: str) -> None:
    """ONNX Runtime in one recipe: accuracy, times, then what its CUDA graphs are worth."""
    bundle = open_bundle(settings.bundle, check_files=False)
    graphs = graphs_in(settings, precision)

    def open_backend(records: bool) -> Backend:
        if settings.device == "cpu":
            return OnnxRuntimeBackend(bundle, graphs)
        _, device = settings.gpu()
        most = _BATCHES[-1]
        return OnnxRuntimeLanes(
            bundle, graphs, device, GpuOptions(), max_images=most, records=records
        )

    before = 0 if settings.device == "cpu" else used()
    model = SegmentationModel(bundle, open_backend(True))
    measure(record, settings, model)
    if settings.device == "cpu":
        return
    record.put("device memory, MB", (used() - before) / 1e6)
    record.attempt("check_threads", gpu_checks.check_threads, model)
    record.attempt("check_slow_consumer", gpu_checks.check_slow_consumer, model, torch)
    record.attempt("calls in new threads", gpu_checks.check_leaks, model, used, in_new_threads=True)
    record.attempt("close", model.close)
    if settings.seconds_left > 15:
        model = SegmentationModel(bundle, open_backend(False))
        image, click = gpu_checks.picture(1080, 1920), _clicks(1)
        embedding = model.encode(image)
        record.put("without CUDA graphs, encode", times(lambda: model.encode(image), 1.0))
        record.put(
            "without CUDA graphs, click",
            times(lambda: model.segment(embedding, click, max_hole_area=256.0), 1.0),
        )


def graphs_in(settings: Settings, precision: str) -> Graphs:
    """What ONNX Runtime runs in a recipe; typed graphs are made here, unless they are there."""
    bundle = open_bundle(settings.bundle, check_files=False)
    if precision not in TYPED_ORDER:
        return Graphs(bundle, precision, tf32=precision == "tf32")
    if not typed_folder(bundle.path, precision).is_dir():
        build_typed_graphs(bundle, [precision])
    return next(graphs for graphs in find_typed(bundle) if graphs.precision == precision)


def kernel_table(record: Record, settings: Settings, precision: str) -> None:
    """Kernels of an image, a click and 16 objects by their time on the GPU, without CUDA graphs.

    On the CPU, PyTorch's operators: ONNX Runtime tells the profiler nothing there.
    """
    bundle = open_bundle(settings.bundle, check_files=False)
    cuda, device = settings.gpu()
    backend: LaneBackend
    if settings.device == "cpu":
        backend = StandInBackend(bundle, cuda, device)
    else:
        graphs = graphs_in(settings, precision)
        backend = OnnxRuntimeLanes(bundle, graphs, device, GpuOptions(lanes=1), records=False)
    model = SegmentationModel(bundle, backend)
    image = gpu_checks.picture(*((90, 120) if settings.small else (1080, 1920)))
    embedding = model.encode(image)
    holes = model.manifest.masks.max_hole_area
    for name, call in (
        ("encode", lambda: model.encode(image)),
        ("one click", lambda: model.segment(embedding, _clicks(1), max_hole_area=holes)),
        ("16 objects", lambda: model.segment(embedding, _boxes(16), max_hole_area=holes)),
    ):
        record.attempt(name, _kernels_of, name, call, settings)


def _kernels_of(name: str, call: Callable[[], Any], settings: Settings) -> Any:
    """What one call runs: milliseconds and count of each kernel, and of all, the longest first."""
    for _ in range(3):
        call()
    on_gpu = settings.device != "cpu"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as seen:
        for _ in range(_PROFILED):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events() or ():
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    rows = [("all", [time for times in found.values() for time in times]), *found.items()]
    rows.sort(key=lambda row: -sum(row[1]))
    return [
        {
            "what": kernel[:150],
            "of": name,
            "ms": sum(took) / _PROFILED,
            "count": len(took) / _PROFILED,
        }
        for kernel, took in rows[:_KERNELS]
    ]


def measure(record: Record, settings: Settings, model: SegmentationModel) -> None:
    """The gate's figures, then times at 1080p from NumPy to NumPy."""
    backend, manifest = model.backend, model.manifest
    record.put("versions", backend.versions())
    record.attempt("gate", _gate, backend)
    if isinstance(backend, LaneBackend):
        record.put("resizes on the device", backend.imaging.preprocess_allowed)
        record.put("makes masks on the device", backend.imaging.postprocess_allowed)
    record.attempt("prepare", backend.prepare)
    size = (90, 120) if settings.small else (1080, 1920)
    image = gpu_checks.picture(*size)
    seconds = 0.05 if settings.small else 1.5
    embedding = model.encode(image)
    holes = manifest.masks.max_hole_area

    def segment(prompts: Prompts, multimask: bool = True) -> Any:
        # What SAM 3's predictor does by default: three masks, holes filled, as uint8.
        return model.segment(embedding, prompts, multimask, max_hole_area=holes, dtype=np.uint8)

    pixels, _ = preprocess(manifest.image, image)
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: model.encode(image),
        "encode, resized before": lambda: backend.encode(pixels),
        "one click": lambda: segment(_clicks(1)),
        "one click, single mask": lambda: segment(_clicks(1), False),
        "four boxes": lambda: segment(_boxes(4)),
        "16 objects": lambda: segment(_boxes(16)),
        "64 objects": lambda: segment(_boxes(64)),
        "logits of one click": lambda: model.decode(embedding, _clicks(1)),
        "image and one click": lambda: model.segment(
            model.encode(image), _clicks(1), max_hole_area=holes, dtype=np.uint8
        ),
    }
    if backend.joins_images:
        several = [model.encode(gpu_checks.picture(*size, seed)) for seed in range(16)]
        clicks = [_clicks(1)] * len(several)
        options = MaskOptions(max_hole_area=holes, dtype=np.uint8)
        calls["16 images, a click each, together"] = lambda: model.segment_batch(
            several, clicks, True, options
        )
        calls["16 images, a click each, in turn"] = lambda: [
            model.segment_batch([one], [click], True, options)
            for one, click in zip(several, clicks, strict=True)
        ]
    if backend.device == "cpu" and settings.small:
        del calls["64 objects"]
    for name, call in calls.items():
        record.attempt(f"{name}, times", times, call, seconds)
    for count in _BATCHES:
        images = [gpu_checks.picture(*size, seed) for seed in range(count)]
        record.attempt(
            f"encode {count} together, times",
            lambda images=images: times(lambda: model.encode_batch(images), seconds),
        )


def _gate(backend: Backend) -> Any:
    manifest = backend.bundle.manifest
    limits = limits_for(manifest, backend.precision)
    verdict = judge(verify(backend, manifest, load_record(backend.bundle), limits))
    worst = {name: m.value for name, m in verdict.worst().items()}
    ious = [m.value for m in verdict.measurements if m.metric == "mean IoU"]
    mean = {"mean mask IoU": float(np.mean(ious))} if ious else {}
    return {"passed": verdict.passed, "said": verdict.explain(), **mean, **worst}


def pytorch(record: Record, settings: Settings) -> None:
    """PyTorch eager in FP32, in BF16 by autocast, and compiled: in one process, in turn.

    What takes long comes last: the gate's calls compile the decoder for one size after another.
    """
    bundle = open_bundle(settings.bundle, check_files=False)
    names = ["fp32", "bf16", "compile-bf16"]
    if settings.small:
        names.pop()  # compiling takes longer than everything else
    image = gpu_checks.picture(1080, 1920)
    pixels, _ = preprocess(bundle.manifest.image, image)
    device = "cuda:0" if settings.device == "cuda" else "cpu"
    backends: dict[str, PyTorchBackend] = {}
    for name in names:
        backend = backends[name] = PyTorchBackend(
            bundle, settings.checkpoint, precision=name, device=device, threads=None
        )
        record.attempt(
            f"{name}, first run", lambda b=backend: {"seconds": timed(lambda: b.encode(pixels))[0]}
        )
    effort = Effort(30, min(10.0, max(1.0, settings.seconds_left / 4)), 2)
    if settings.small:
        effort = Effort(3, 0.5, 1)

    def in_turn(what: str, calls: dict[str, Callable[[], Any]]) -> None:
        for name, found in alternate(calls, effort).items():
            record.put(f"{name}, {what}", {"median_ms": found.median_ms, "p95_ms": found.p95_ms})

    in_turn("encode", {n: partial(b.encode, pixels) for n, b in backends.items()})
    models = {name: SegmentationModel(bundle, backend) for name, backend in backends.items()}
    embeddings = {name: model.encode(image) for name, model in models.items()}
    for label, prompts in (("one click", _clicks(1)), ("four boxes", _boxes(4))):
        calls = {n: partial(m.decode, embeddings[n], prompts) for n, m in models.items()}
        in_turn(f"logits of {label}", calls)
    there = torch.from_numpy(pixels).to(device)
    for name, backend in backends.items():
        alone = partial(backend.encode_tensor, there)
        record.put(
            f"{name}, encoder alone", device_times(alone, settings.device, effort.repetitions)
        )
    for name, backend in backends.items():
        record.attempt(f"{name}, gate", _gate, backend)


def tensorrt(record: Record, settings: Settings) -> None:
    """TensorRT, and TensorRT for RTX, where they are installed and know the GPU."""
    for name in ("tensorrt", "tensorrt-rtx"):
        if importlib.util.find_spec(name.replace("-", "_")) is None:
            record.put(name, "is not installed")
            continue
        found = record.attempt(name, _build_and_load, settings, name)
        if found is not None:
            record.put(name, "was built")
            measure(record, settings, load_model(settings.bundle, backend=name))


def _build_and_load(settings: Settings, name: str) -> str:
    from sam3rt_build.build import BuildOptions, build_bundle

    bundle = open_bundle(settings.bundle)
    build_bundle(bundle, BuildOptions(backend=name, max_batch=_BATCHES[-1]))  # type: ignore[arg-type]
    return "was built"


def _clicks(count: int) -> Prompts:
    points = [[[40.0 + i, 50.0]] for i in range(count)]
    return Prompts(point_coords=points, point_labels=[[1]] * count)


def _boxes(count: int) -> Prompts:
    return Prompts(
        box=[[5.0 + i % 8, 6.0 + i // 8, 70.0 + i % 8, 60.0 + i // 8] for i in range(count)]
    )


def used() -> int:
    """Bytes of device memory in use, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)
