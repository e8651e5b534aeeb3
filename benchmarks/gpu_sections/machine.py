"""Versions, and the best that the GPU does: products, copies, and the shapes of our own layers."""

from __future__ import annotations

import importlib.metadata

import torch
from benchmarks.gpu_sections.record import Record, Settings, device_times
from benchmarks.report import conditions

_PACKAGES = (
    *("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "torch", "transformers"),
    *("cuda-bindings", "cupy-cuda13x", "tensorrt", "tensorrt-rtx"),
)
_TYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


def versions(record: Record, settings: Settings) -> None:
    """What the figures were made with."""
    found = conditions()
    record.put("machine", found["machine"])
    record.put("versions", found["versions"] | {name: _version(name) for name in _PACKAGES})
    if settings.device == "cpu":
        return
    _, device = settings.gpu()
    properties = torch.cuda.get_device_properties(0)
    record.put(
        "gpu",
        {
            "name": device.gpu.name,
            "compute capability": device.gpu.compute_capability,
            "driver": device.driver_version,
            "CUDA of the driver": ".".join(map(str, device.cuda_version)),
            "CUDA of PyTorch": torch.version.cuda,
            "memory, GB": device.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "count": torch.cuda.device_count(),
        },
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def ceilings(record: Record, settings: Settings) -> None:
    """Matrix products and copies as large as they come."""
    device = settings.device
    side = 256 if settings.small else 8192
    half = torch.backends.cuda.matmul
    for name, dtype in _TYPES.items():
        half.allow_tf32 = name == "tf32"
        for sums in ("fp32", "fp16") if name == "fp16" and device != "cpu" else ("fp32",):
            half.allow_fp16_accumulation = sums == "fp16"
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in "ab")
            found = device_times(lambda a=a, b=b: a @ b, device, 10)
            key = f"product of {side}, {name}" + (", FP16 sums" if sums == "fp16" else "")
            record.put(key, found | {"TFLOP/s": 2e-9 * side**3 / found["median_ms"]})
        half.allow_fp16_accumulation = half.allow_tf32 = False
    count = 1 << (20 if settings.small else 30)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = device_times(lambda: target.copy_(source), device, 10)
    record.put("copy", found | {"GB/s, both ways": 2e-6 * count / found["median_ms"]})
