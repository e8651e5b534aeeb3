"""``sam3rt compare``: two backends or precisions of one bundle, side by side."""

from __future__ import annotations

import argparse
import sys
from typing import Literal

from sam3rt.bundle import open_bundle
from sam3rt.cli.options import named_path, printable
from sam3rt.errors import BackendError, InvalidInputError

HELP = "compare two backends or precisions, whole or layer by layer"
DESCRIPTION = """\
Run one bundle in two ways on the inputs of its parity record and show how far they are apart.

A and B are BACKEND or BACKEND:PRECISION, such as onnxruntime, openvino:bf16, tensorrt:fp16, or
simulated:RECIPE, which rounds on the CPU as a precision recipe would. Exits with 1 where B is
outside the gate's limits of A. With --layers, values inside one graph are compared, which tells
where a wrong engine goes wrong; for TensorRT an engine that yields them is built first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("bundle", type=named_path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument("first", metavar="A", help="what to compare with")
    parser.add_argument("second", metavar="B", help="what to compare")
    parser.add_argument(
        "--layers",
        metavar="REGEX",
        help=r"compare the values of nodes whose names match, such as 'blocks\.\d+/Add'",
    )
    parser.add_argument(
        "--graph",
        choices=("encoder", "decoder"),
        help="whose layers (default: encoder)",
    )


def run(options: argparse.Namespace) -> int:
    """Compare."""
    bundle = open_bundle(options.bundle)
    if options.graph is not None and options.layers is None:
        raise InvalidInputError("--graph", repr(options.graph), "--layers with it")
    role: Literal["encoder", "decoder"] = options.graph or "encoder"
    try:
        from ..compare import compare_layers, compare_models, parse_side
    except ModuleNotFoundError as error:
        raise BackendError(
            f"comparing needs {(error.name or '').split('.')[0]}: pip install 'sam3rt[build]'"
        ) from error
    first, second = parse_side(options.first), parse_side(options.second)
    if options.layers is not None:
        print(f"{'layer':<52}{'shape':<22}{'cosine':>12}{'max error':>12}{'largest':>12}")
        try:
            for layer in compare_layers(bundle, role, first, second, options.layers):
                shape = "x".join(map(str, layer.shape))
                print(
                    f"{printable(layer.layer):<52}{shape:<22}{layer.cosine:>12.8f}{layer.error:>12.4g}"
                    f"{layer.largest:>12.4g}"
                )
        except ModuleNotFoundError as error:
            raise BackendError(
                f"layers need {(error.name or '').split('.')[0]}: pip install 'sam3rt[build]'"
            ) from error
        return 0
    verdict = compare_models(bundle, first, second)
    print(f"{second.name} against {first.name}, worst of {len(verdict.measurements)} comparisons:")
    for name, m in verdict.worst().items():
        allowed = (">= " if m.at_least else "<= ") + f"{m.limit:g}"
        mark = "" if m.passed else "  <-- off"
        print(f"  {name:<32}{m.value:>12.6g}{allowed:>12}  {printable(m.case)}{mark}")
    if not verdict.passed:
        print(f"outside the gate's limits: {verdict.explain()}", file=sys.stderr)
    return 0 if verdict.passed else 1
