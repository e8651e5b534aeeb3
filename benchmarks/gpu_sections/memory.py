"""Whose the device memory is that calls take: an experiment on ONNX Runtime in BF16.

On an H200, memory in use grew by 0.5 to 1.4 GB over 30 calls, in BF16 and in no other recipe. It
alone has convolutions in FP32, which cuDNN computes in TF32 with working memory of its own, beside
fused attention, which takes little. Causes that can be told apart here:

* Another process. Memory in use is the whole GPU's, and changes while nothing runs here.
* ONNX Runtime's arena. The working memory of a convolution is one piece, which is taken from the
  arena for each run. Where small values have split what is free, the arena takes more from the GPU.
  Then growth ends after some calls, a run that shrinks the arena gives it back, and there is none
  without TF32 or where the arena doubles.
* A leak. Growth goes on with every call, and shrinking gives nothing back.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from benchmarks.gpu_sections.models import graphs_in, used
from benchmarks.gpu_sections.record import Record, Settings
from benchmarks.report import resident_mb
from tests.support import gpu_checks

from sam3rt import GpuOptions, SegmentationModel, open_bundle
from sam3rt.backends.onnxruntime.lanes import OnnxRuntimeLanes
from sam3rt.backends.onnxruntime.sessions import cuda_options, open_session

# Calls after which memory is read.
_CALLS = (5, 10, 20, 40, 60)
_CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without TF32": {"use_tf32": 0},
    "an arena that doubles": {"arena_extend_strategy": "kNextPowerOfTwo"},
    "heuristic choice of convolutions": {"cudnn_conv_algo_search": "HEURISTIC"},
}


def memory(record: Record, settings: Settings, precision: str) -> None:
    """The encoder's session by itself with several options, then whole models in lanes."""
    on_gpu = settings.device != "cpu"
    # ONNX Runtime has no BF16 on the CPU.
    graphs = graphs_in(settings, precision if on_gpu else "fp16")
    in_use = used if on_gpu else _resident
    record.put("while nothing runs", _idle(in_use))
    graph = graphs.bundle.manifest.encoder
    kind = "cuda" if on_gpu else "cpu"
    for name, changes in _CHANGES.items():
        options = cuda_options(0, graphs, graph) | changes if on_gpu else None
        before = in_use()
        session = open_session(graphs, graph, options)
        record.attempt(name, _follow, _encoder(session, graph.inputs[0].name, kind), in_use, before)
        del session
        gc.collect()
    if not on_gpu:
        return
    _, device = settings.gpu()
    bundle = open_bundle(settings.bundle, check_files=False)
    for records in (False, True):
        model = SegmentationModel(
            bundle, OnnxRuntimeLanes(bundle, graphs, device, GpuOptions(), records=records)
        )
        name = "in lanes, recorded" if records else "in lanes"
        record.attempt(name, gpu_checks.check_leaks, model, in_use)
        model.close()


def _encoder(session: Any, name: str, kind: str) -> Callable[[bool], None]:
    """A run of an encoder, and whether it is to shrink the arena afterwards."""
    shape = [side if isinstance(side, int) else 1 for side in session.get_inputs()[0].shape]
    pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(pixels, kind, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, kind, 0)

    def run(shrinks: bool) -> None:
        options = ort.RunOptions()
        if shrinks:
            where = "gpu:0" if kind == "cuda" else "cpu:0"
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", where)
        session.run_with_iobinding(binding, options)

    return run


def _follow(run: Callable[[bool], None], in_use: Callable[[], int], before: int) -> dict[str, Any]:
    """Megabytes in use after so many calls, over those before the session was there."""
    found: dict[str, Any] = {}
    done = 0
    for count in _CALLS:
        while done < count:
            run(False)
            done += 1
        found[f"after {count}, MB"] = (in_use() - before) / 1e6
    try:
        run(True)
    except Exception as error:  # the figures before it are worth more
        return found | {"shrunk, MB": f"{type(error).__name__}: {error}"[:200]}
    return found | {"shrunk, MB": (in_use() - before) / 1e6}


def _idle(in_use: Callable[[], int]) -> dict[str, Any]:
    """How much memory in use changes by itself within a second."""
    readings = []
    for _ in range(10):
        readings.append(in_use())
        time.sleep(0.1)
    return {"changes by, MB": (max(readings) - min(readings)) / 1e6}


def _resident() -> int:
    """Bytes of this process in the host's memory."""
    return int(1e6 * resident_mb())
