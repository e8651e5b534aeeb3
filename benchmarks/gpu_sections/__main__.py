"""Run one section.

python -m benchmarks.gpu_sections NAME --work FOLDER --result FILE --device cuda --seconds 60
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import logging
import sys
import time
from pathlib import Path

from benchmarks.gpu_sections.record import Record, Settings


def main() -> None:
    """Import the section's module and call its function of the section's name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("function", metavar="MODULE:FUNCTION")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    settings = Settings(
        options.work, options.device, options.small, time.monotonic() + options.seconds
    )
    # Before ONNX Runtime, which then finds the CUDA libraries that PyTorch has loaded.
    import torch  # noqa: F401

    module, _, function = options.function.partition(":")
    section = getattr(importlib.import_module(f"benchmarks.gpu_sections.{module}"), function)
    section(Record(options.result), settings, *options.arguments)


if __name__ == "__main__":
    main()
