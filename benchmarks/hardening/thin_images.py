"""Images of one pixel's height or width: do encoding and predicting take no more than for others?

    python -m benchmarks.hardening.thin_images [--length 100000 ...] [--output FILE]

Each image is encoded and clicked on in a process of its own, with limits on time and memory, beside
one of ordinary shape. A thin image passes where it takes at most twice the time and 500 MB more
memory than the ordinary one, or where it is refused by an ImageError. Exits with 1 where one does
not.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser

import sam3rt
from sam3rt_bench.starts import peak_host_mb

_ORDINARY = (480, 640)
_LENGTHS = (1_000, 30_000, 100_000, 1_000_000)
_ALLOWED_RATIO = 2.0
_ALLOWED_MB = 500.0
_SECONDS = 120.0
# Address space, which is larger than what is resident.
_MEMORY_BYTES = 16 << 30


def segment(height: int, width: int) -> dict[str, Any]:
    """Encode an image and click on it: seconds, and the peak of memory in MB."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    model = sam3rt.load_model(backend="onnxruntime", device="cpu", threads=1)
    model.backend.prepare()
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    image = np.zeros((height, width, 3), np.uint8)
    start = time.perf_counter()
    try:
        predictor.set_image(image)
        encoded = time.perf_counter()
        predictor.predict([[width / 2, height / 2]], [1])
    except sam3rt.ImageError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"failed": f"MemoryError at {_MEMORY_BYTES >> 30} GiB"}
    return {
        "set_image_seconds": round(encoded - start, 2),
        "predict_seconds": round(time.perf_counter() - encoded, 2),
        "peak_mb": peak_host_mb(),
    }


def observe(height: int, width: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hardening.thin_images"]
    command += ["--segment", str(height), str(width)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took over {_SECONDS:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def passes(found: dict[str, Any], ordinary: dict[str, Any]) -> bool:
    """Whether an image took no more than an ordinary one, or was refused."""
    if "refused" in found or "failed" in found:
        return "refused" in found
    seconds = [x["set_image_seconds"] + x["predict_seconds"] for x in (found, ordinary)]
    more = found["peak_mb"] - ordinary["peak_mb"]
    return bool(seconds[0] <= _ALLOWED_RATIO * seconds[1] and more <= _ALLOWED_MB)


def main() -> int:
    """Run, print and write what was found."""
    parser = script_parser(__doc__)
    parser.add_argument("--length", action="append", type=int, dest="lengths")
    parser.add_argument("--segment", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.segment:
        print(json.dumps(segment(*options.segment)))
        return 0
    ordinary = observe(*_ORDINARY)
    rows = []
    for length in options.lengths or _LENGTHS:
        for size in ((1, length), (length, 1)):
            found = observe(*size)
            rows.append({"size": size, "passes": passes(found, ordinary), **found})
            print(rows[-1], file=sys.stderr, flush=True)
    ordinary["size"] = _ORDINARY
    publish(conditions("onnxruntime") | {"ordinary": ordinary, "thin": rows}, options.output)
    return int(not all(row["passes"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
