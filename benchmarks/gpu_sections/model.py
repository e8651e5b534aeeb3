"""The model that the other sections measure: SAM 3 of the published size with seeded weights."""

from __future__ import annotations

import shutil
import time

import numpy as np
import torch
from benchmarks.gpu_sections.record import Record, Settings
from tests.golden.sam3 import synthetic

from sam3rt.backends.onnxruntime.typed import TYPED_ORDER
from sam3rt.bundle import open_bundle
from sam3rt_build.ort_graphs import build_typed_graphs
from sam3rt_export import export_bundle


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
