"""One call of `predict` in two checkouts of this project, in turn: did a click become slower?

    git worktree add ../before COMMIT
    python -m benchmarks.two_versions ../before [--rounds 40] [--output FILE]

Each checkout runs the bundled model in a process of its own, on one thread. In every round each
process makes the same calls, the order changing from round to round. What is compared is processor
time, which other work on the machine disturbs less than the clock; the ratio of the medians is what
counts. Exits with 1 where a call takes over a tenth more than before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import conditions, publish

_ALLOWED = 1.1
_HEIGHT, _WIDTH = 1080, 1920
_CALLS: dict[str, dict[str, Any]] = {
    "one click": {"point_coords": [[900, 500]], "point_labels": [1]},
    "one box": {"box": [400, 200, 1500, 900]},
    "five clicks": {
        "point_coords": [[900, 500], [910, 520], [100, 90], [700, 300], [1200, 800]],
        "point_labels": [1, 1, 0, 1, 0],
    },
    "four boxes": {
        "box": [
            [100, 100, 600, 500],
            [700, 90, 1300, 600],
            [60, 600, 500, 1000],
            [900, 700, 1800, 1050],
        ]
    },
}
_WORKER = """
import json, sys, time
import numpy as np
import sam3rt
backend, height, width, holes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
model = sam3rt.load_model(backend=backend, device="cpu", precision="fp32", threads=1)
predictor = sam3rt.SAM3InteractiveImagePredictor(model, max_hole_area=holes)
rng = np.random.default_rng(0)
cells = rng.integers(0, 256, (9, 16, 3), dtype=np.uint8)
predictor.set_image(np.ascontiguousarray(np.kron(cells, np.ones((120, 120, 1), np.uint8))))
for line in sys.stdin:
    call = {name: np.asarray(value) for name, value in json.loads(line).items()}
    start = time.process_time()
    predictor.predict(**call)
    print(time.process_time() - start, flush=True)
"""


class _Version:
    """A process that predicts with one checkout's code."""

    def __init__(self, checkout: Path, backend: str, holes: float) -> None:
        environment = os.environ | {
            "PYTHONPATH": str(checkout.resolve() / "runtime"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, backend, str(_HEIGHT), str(_WIDTH), str(holes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, call: dict[str, Any]) -> float:
        """Processor time of one call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(before: Path, after: Path, backend: str, holes: float, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each call in both checkouts, and their ratio."""
    versions = {
        "before": _Version(before, backend, holes),
        "after": _Version(after, backend, holes),
    }
    rows: dict[str, Any] = {}
    try:
        for name, call in _CALLS.items():
            times: dict[str, list[float]] = {version: [] for version in versions}
            for number in range(rounds + 1):
                order = list(versions) if number % 2 else list(reversed(versions))
                for version in order:
                    seconds = versions[version].seconds(call)
                    if number:  # the first call of a shape plans its memory
                        times[version].append(1e3 * seconds)
            medians = {version: statistics.median(values) for version, values in times.items()}
            rows[name] = {
                "before_ms": round(medians["before"], 2),
                "after_ms": round(medians["after"], 2),
                "ratio": round(medians["after"] / medians["before"], 3),
            }
            print(backend, f"holes {holes:g}", name, rows[name], file=sys.stderr, flush=True)
    finally:
        for version in versions.values():
            version.close()
    return rows


def main() -> int:
    """Compare on both CPU backends, with and without holes filled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the earlier version")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--backend", action="append", choices=("onnxruntime", "openvino"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    after = Path(__file__).resolve().parents[1]
    rows = {
        f"{backend}, {what}": compare(options.before, after, backend, holes, options.rounds)
        for backend in options.backend or ("onnxruntime", "openvino")
        for what, holes in (("no holes filled", 0.0), ("holes filled", 256.0))
    }
    publish({**conditions(), "rounds": options.rounds, "processor_time": rows}, options.output)
    return int(any(row["ratio"] > _ALLOWED for group in rows.values() for row in group.values()))


if __name__ == "__main__":
    sys.exit(main())
