"""The CUDA layer, the lanes over a stand-in engine, and the kernels around the network."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from benchmarks.gpu_sections.models import used
from benchmarks.gpu_sections.record import Record, Settings, times
from tests.support import gpu_checks
from tests.support.torch_lanes import StandInBackend

from sam3rt import Prompts, SegmentationModel, load_model, open_bundle
from sam3rt.bundle.default import default_bundle_path


def cuda_layer(record: Record, settings: Settings) -> None:
    """Memory, copies, streams, recorded graphs and DLPack, each by itself."""
    cuda, _ = settings.gpu()
    for check in gpu_checks.CUDA_CHECKS:
        record.attempt(check.__name__, check, cuda)
    for name in ("numpy",) if settings.device == "cpu" else ("torch", "cupy"):
        record.attempt(f"check_dlpack, {name}", _dlpack, cuda, name)
    record.put("lost", cuda.lost or "no")


def _dlpack(cuda: Any, name: str) -> Any:
    return gpu_checks.check_dlpack(cuda, importlib.import_module(name))


def lanes(record: Record, settings: Settings) -> None:
    """Lanes whose engines are PyTorch on their addresses and streams."""
    cuda, device = settings.gpu()
    # The bundled model, which needs no making; at small size the other one, which is smaller yet.
    path = settings.bundle if settings.small else default_bundle_path()
    bundle = open_bundle(path, check_files=False)
    model = SegmentationModel(bundle, StandInBackend(bundle, cuda, device))
    reference = load_model(path, backend="onnxruntime", device="cpu")
    image = gpu_checks.picture(90, 120)
    click = Prompts(point_coords=[[20.0, 40.0]], point_labels=[1])
    here, there = model.encode(image), reference.encode(image)
    errors = [
        float(np.abs(a - b).max() / np.abs(b).max())
        for a, b in zip(here.features.numpy(), there.features.numpy(), strict=True)
    ]
    record.put("largest error of the features, relative", max(errors))
    expected, masks = reference.segment(there, click)
    for name in ("queued", "recorded", "replayed"):
        found, other = model.segment(here, click)
        record.put(
            f"click, {name}",
            {
                "largest error of a logit": np.abs(
                    found.low_res_masks - expected.low_res_masks
                ).max(),
                "largest logit": np.abs(expected.low_res_masks).max(),
                "share of differing mask pixels": (masks != other).mean(),
            },
        )
    backend = model.backend
    assert isinstance(backend, StandInBackend)
    imaging = backend.imaging
    record.put("resizes on the device", imaging.preprocess_allowed)
    record.put("makes masks on the device", imaging.postprocess_allowed)
    record.attempt("check_threads", gpu_checks.check_threads, model)
    if settings.device != "cpu":
        record.attempt("check_slow_consumer, torch", gpu_checks.check_slow_consumer, model, torch)
        record.attempt(
            "check_slow_consumer, cupy",
            lambda: gpu_checks.check_slow_consumer(model, importlib.import_module("cupy")),
        )
        record.attempt("check_leaks", gpu_checks.check_leaks, model, used)
    record.put("click, times", times(lambda: model.segment(here, click), 1.0))
    record.attempt("close", model.close)


def kernels(record: Record, settings: Settings) -> None:
    """What NVRTC compiles against the host, by the rules of both models; on the CPU, C++."""
    cuda, device = settings.gpu()
    for path in (default_bundle_path(), settings.bundle):
        if settings.small and path != settings.bundle:
            continue
        bundle = open_bundle(path, check_files=False)
        backend = StandInBackend(bundle, cuda, device)
        name = bundle.manifest.model_type
        record.attempt(name, gpu_checks.check_kernels, backend)
        record.attempt(f"{name}, times", _kernel_times, backend)
        backend.close()


def _kernel_times(backend: StandInBackend) -> Any:
    """1080p: preprocessing with the copy of the result to the host, and three masks."""
    from sam3rt.geometry import geometry
    from sam3rt.masks import MaskOptions

    manifest = backend.bundle.manifest
    image, where = gpu_checks.picture(1080, 1920), geometry(manifest.image, (1080, 1920))
    logits = np.random.default_rng(0).standard_normal(
        (1, manifest.masks.multimask, *manifest.masks.low_res_size), np.float32
    )
    options = MaskOptions(0.0, 256.0, dtype=np.uint8)
    return {
        "pixels": times(lambda: backend.pixels(image, where), 0.5),
        "masks": times(lambda: backend.make_masks(logits, where, options), 0.5),
    }
