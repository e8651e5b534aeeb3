"""``sam3rt verify``: is a bundle whole, and are its outputs right on this machine?"""

from __future__ import annotations

import argparse
import sys

from ..accuracy.gate import limits_for
from ..accuracy.metrics import Measurement
from ..accuracy.record import load_record
from ..accuracy.run import verify
from ..bundle import check_file, open_bundle
from ..bundle.default import default_bundle_path
from ..errors import BundleError
from .options import add_bundle_argument, add_model_options, load_from_options, printable

HELP = "check a bundle's files and its outputs on this machine"
DESCRIPTION = """\
Check a bundle: every file against its hash, then every output against the parity record.

The parity record holds small inputs and the FP32 outputs they must give. A backend that computes
in FP32 is held to the bundle's own limits, any other to the gate's. Exits with 1 where anything is
off, with a table of what.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_bundle_argument(parser)
    parser.add_argument("--all", action="store_true", help="show what is right as well")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    """Verify."""
    path = default_bundle_path() if options.bundle is None else options.bundle
    bundle = open_bundle(path, check_files=False)
    shown = printable(str(bundle.path))
    damaged = []
    for entry in bundle.manifest.files():
        try:
            check_file(bundle.path, entry)
        except BundleError as error:
            damaged.append(str(error))
    if damaged:
        print(f"{shown}: {len(damaged)} of {len(bundle.manifest.files())} files are off")
        for line in damaged:
            print(f"  {printable(line)}")
        return 1
    print(f"{shown}: {len(bundle.manifest.files())} files match their hashes")
    model = load_from_options(options, check_files=False)
    limits = limits_for(bundle.manifest, model.backend.precision)
    measurements = []
    for measurement in verify(model.backend, bundle.manifest, load_record(bundle), limits):
        measurements.append(measurement)
        if sys.stderr.isatty():
            print(f"\r{len(measurements)} comparisons", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    wrong = [m for m in measurements if not m.passed]
    if wrong or options.all:
        _print_table(measurements if options.all else wrong)
    where = f"{model.backend.name} on {model.device} in {model.backend.precision}"
    print(f"{where}: {len(measurements) - len(wrong)} of {len(measurements)} comparisons pass")
    return 1 if wrong else 0


def _print_table(measurements: list[Measurement]) -> None:
    width = max(len(m.subject) for m in measurements) + 2
    print(f"{'output':<{width}}{'metric':<16}{'measured':>12}{'allowed':>14}")
    for m in measurements:
        allowed = (">= " if m.at_least else "<= ") + f"{m.limit:.6g}"
        mark = "" if m.passed else "  <-- off"
        print(f"{m.subject:<{width}}{m.metric:<16}{m.value:>12.6g}{allowed:>14}{mark}")
