"""A process that has a model loaded forks: does the child hang or crash, and does the parent go on?

    python -m benchmarks.hardening.fork [--backend openvino ...] [--output FILE]

For every backend and every thing a child may do with what it inherits, a fresh process loads the
model, segments once and forks. A child ends well where it ends by itself with status 0 in the time
allowed; where it asks the model, an error of sam3rt is an answer too. The parent must then answer
as before and end with status 0. Exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import conditions, publish, script_parser

import sam3rt

BACKENDS = ("onnxruntime", "openvino")
# What the child does before it ends as any program does.
ACTIONS = ("nothing", "drop", "predict", "load")
_SECONDS = 60.0


def scenario(backend: str, action: str, bundle: Path | None, seconds: float) -> str:
    """In this process: load, segment, fork, and say how the child ended."""
    model = sam3rt.load_model(bundle, backend=backend, device="cpu", precision="fp32", threads=2)
    predictor = sam3rt.SAM3InteractiveImagePredictor(model)
    predictor.set_image(np.zeros((48, 64, 3), np.uint8))
    before = predictor.predict([[30, 20]], [1])[2]
    child = os.fork()
    if child == 0:
        if action == "drop":
            del predictor, model
            gc.collect()
        elif action == "predict":
            try:
                predictor.predict([[30, 20]], [1])
            except sam3rt.Sam3rtError as error:
                print(f"refused: {type(error).__name__}", end=" ", flush=True)
        elif action == "load":
            del predictor
            model = sam3rt.load_model(bundle, backend=backend, device="cpu", precision="fp32")
            model.encode(np.zeros((48, 64, 3), np.uint8))
        sys.exit(0)
    ended = _wait(child, seconds)
    if not np.array_equal(predictor.predict([[30, 20]], [1])[2], before):
        return f"{ended}; the parent's answer changed"
    return ended


def _wait(child: int, seconds: float) -> str:
    """How a child ended, which is killed when its time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return f"killed by signal {-code}" if code < 0 else f"ended with {code}"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return f"hung for {seconds:.0f} s"


def observe(backend: str, action: str, bundle: Path | None, seconds: float) -> dict[str, Any]:
    """Run one scenario in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hardening.fork", "--scenario", backend, action]
    command += ["--seconds", str(seconds)]
    if bundle is not None:
        command += ["--bundle", str(bundle)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=2 * seconds + 60, check=False
        )
    except subprocess.TimeoutExpired:
        return {"backend": backend, "child": action, "well": False, "found": "the parent hung"}
    found = (done.stdout.splitlines() or ["nothing said"])[-1]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [""])[-1]
        found += f"; the parent ended with {done.returncode} {reason}".rstrip()
    well = done.returncode == 0 and found.endswith("ended with 0")
    return {"backend": backend, "child": action, "well": well, "found": found}


def main() -> int:
    """Run, print and write what was found."""
    parser = script_parser(__doc__)
    parser.add_argument("--backend", action="append", choices=BACKENDS, dest="backends")
    parser.add_argument("--bundle", type=Path, help="default: the bundled model")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="that a child may take")
    parser.add_argument("--scenario", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.scenario:
        print(scenario(*options.scenario, options.bundle, options.seconds), flush=True)
        return 0
    backends = options.backends or list(BACKENDS)
    found = [
        observe(backend, action, options.bundle, options.seconds)
        for backend in backends
        for action in ACTIONS
    ]
    publish(conditions(*backends) | {"forks": found}, options.output)
    return int(not all(row["well"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
