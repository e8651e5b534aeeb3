"""A candidate in a fresh process: load time, first call against steady state, peak memory.

``python -m sam3rt_bench.starts`` is the child; it reads its task as JSON from standard input and
prints its row as the last line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sam3rt.bundle import Bundle, open_bundle
from sam3rt.errors import BackendError
from sam3rt.predictor import SAM3InteractiveImagePredictor

from .candidates import Choice, Settings, load_candidate
from .document import StartRow
from .scene import click, draw_scene
from .timing import Call, timed

_STEADY_CALLS = 5


def measure_start(
    bundle: Bundle, choice: Choice, settings: Settings, size: tuple[int, int], timeout: float
) -> StartRow:
    """Run one candidate in a process of its own.

    Args:
        bundle: the model.
        choice: the candidate.
        settings: as for all candidates.
        size: (height, width) of the image.
        timeout: seconds until it is given up.

    Raises:
        BackendError: the process failed or took too long, or another model lies there by now.
    """
    task = {
        "bundle": str(bundle.path),
        "fingerprint": bundle.manifest.fingerprint,
        "backend": choice.backend,
        "precision": choice.precision,
        "device": settings.device,
        "threads": settings.threads,
        "checkpoint": None if settings.checkpoint is None else str(settings.checkpoint),
        "size": size,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sam3rt_bench.starts"],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{choice.name} took longer than {timeout:.0f} s to start") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BackendError(f"{choice.name} failed in a process of its own: {said}")
    return msgspec.json.decode(lines[-1], type=StartRow)


def _run(task: dict[str, Any]) -> StartRow:
    choice = Choice(task["backend"], task["precision"])
    checkpoint = task["checkpoint"]
    settings = Settings(
        task["device"], task["threads"], None if checkpoint is None else Path(checkpoint)
    )
    image = draw_scene(*task["size"])
    start = time.perf_counter()
    bundle = open_bundle(task["bundle"])
    if bundle.manifest.fingerprint != task["fingerprint"]:
        raise BackendError(f"{bundle.path} is another model now")
    candidate = load_candidate(bundle, choice, settings)
    candidate.model.backend.prepare()
    load = time.perf_counter() - start
    predictor = SAM3InteractiveImagePredictor(candidate.model)
    arguments = click(image.shape[:2]).arguments()
    encodes = [_milliseconds(lambda: predictor.set_image(image)) for _ in range(2)]
    predicts = [
        _milliseconds(lambda: predictor.predict(**arguments)) for _ in range(1 + _STEADY_CALLS)
    ]
    peak_device: Any = getattr(candidate.model.backend, "peak_device_bytes", None)
    if candidate.model.device == "cpu":
        peak_device = None
    return StartRow(
        candidate=candidate.name,
        load_ms=round(1e3 * load, 1),
        first_encode_ms=encodes[0],
        steady_encode_ms=encodes[1],
        first_predict_ms=predicts[0],
        steady_predict_ms=float(np.median(predicts[1:])),
        peak_host_mb=peak_host_mb(),
        peak_device_mb=None if peak_device is None else round(peak_device() / 1e6, 1),
    )


def _milliseconds(call: Call) -> float:
    return round(1e3 * timed(call)[0], 2)


def peak_host_mb() -> float | None:
    """Most resident memory of this process so far, 10^6 bytes; ``None`` on Windows."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux begins at the size of the process that started this one.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


if __name__ == "__main__":
    print(msgspec.json.encode(_run(json.load(sys.stdin))).decode())
