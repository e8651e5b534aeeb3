"""``sam3rt build``: a bundle's TensorRT engines, proved on the GPU that will run them.

Also graphs for ONNX Runtime on CUDA, which the runtime proves.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING

from sam3rt.backends.onnxruntime.typed import TYPED_ORDER
from sam3rt.backends.tensorrt.engines import RECIPE_ORDER, EngineFile
from sam3rt.bundle import Bundle, open_bundle
from sam3rt.cli.options import named_path, positive_int, printable
from sam3rt.errors import BackendError, InvalidInputError

if TYPE_CHECKING:
    from ..plan_evidence import PlanEvidence

HELP = "build a bundle's TensorRT engines (needs the gpu or the rtx extra)"
DESCRIPTION = """\
Build TensorRT engines of a bundle and prove them on its parity record.

Engines run on the kind of GPU and the TensorRT version they were built with, so they are built
where they will run, from the ONNX files that travel. Precisions are tried fastest first; one whose
outputs are off is refused, saying what failed by how much, and the next is tried. So is one that
adds up FP16 products in less than FP32, as far as the engine says: see its line "plan". Engines go
into the bundle's folder "engines".

With --backend tensorrt-rtx and --target, engines are built ahead of time on any machine. They are
unproven until they first load on their target, which proves them before it serves.

With --backend onnxruntime, FP16 graphs for ONNX Runtime on CUDA are written instead, on any machine
and without TensorRT; the runtime proves them at their first load on a GPU. --precision bf16 writes
graphs in BF16, which are loaded where they are asked for.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("bundle", type=named_path, metavar="BUNDLE", help="bundle folder")
    parser.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx", "onnxruntime"),
        default="tensorrt",
        help="what builds and will run them (default: tensorrt)",
    )
    parser.add_argument(
        "--precision",
        action="append",
        choices=("auto", *RECIPE_ORDER, *(r for r in TYPED_ORDER if r not in RECIPE_ORDER)),
        help="recipe to try; repeatable (default: auto: all, fastest first; ahead of time fp16 "
        "and tf32)",
    )
    parser.add_argument(
        "--target",
        dest="targets",
        action="append",
        default=[],
        type=_capability,
        metavar="CAPABILITY",
        help="compute capability to build for ahead of time, such as 8.9 or sm89; repeatable",
    )
    for name, default, what in (
        ("objects", 16, "objects in one decoder call; more are run in parts"),
        ("points", 32, "points per object, box corners and padding included"),
        ("batch", 1, "images in one encoder call, for set_image_batch"),
    ):
        parser.add_argument(
            f"--max-{name}",
            type=positive_int,
            default=default,
            metavar="N",
            help=f"greatest number of {what} (default: {default})",
        )
    parser.add_argument(
        "--workspace",
        type=positive_int,
        metavar="MIB",
        help="memory the builder may try layers with, MiB (default: all there is)",
    )
    parser.add_argument(
        "--device", type=int, default=0, metavar="N", help="number of the GPU (default: 0)"
    )


def run(options: argparse.Namespace) -> int:
    """Build."""
    bundle = open_bundle(options.bundle)
    if options.backend == "onnxruntime":
        return _write_graphs(bundle, options)
    try:
        from ..build import BuildOptions, build_bundle
    except ModuleNotFoundError as error:
        extra = "rtx" if options.backend == "tensorrt-rtx" else "gpu"
        raise BackendError(
            f"the build needs {(error.name or '').split('.')[0]}: pip install 'sam3rt[{extra}]', "
            "or 'sam3rt[build]' beside a TensorRT that is there already, as on a Jetson"
        ) from error
    precision = options.precision or ["auto"]
    engines = build_bundle(
        bundle,
        BuildOptions(
            backend=options.backend,
            precision="auto" if "auto" in precision else tuple(precision),
            targets=tuple(dict.fromkeys(options.targets)),
            max_objects=options.max_objects,
            max_points=options.max_points,
            max_batch=options.max_batch,
            workspace=None if options.workspace is None else options.workspace << 20,
            device=options.device,
        ),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    from ..plan_evidence import load_evidence

    for engine in engines:
        _print(engine, load_evidence(engine.path))
    _say_next(options, options.backend)
    return 0


def _write_graphs(bundle: Bundle, options: argparse.Namespace) -> int:
    if options.targets:
        raise InvalidInputError(
            "target", ", ".join(options.targets), "none: these graphs run on every NVIDIA GPU"
        )
    try:
        from ..ort_graphs import build_typed_graphs
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the build needs {(error.name or '').split('.')[0]}: pip install 'sam3rt[build]'"
        ) from error
    precision = options.precision or ["auto"]
    folders = build_typed_graphs(
        bundle,
        () if "auto" in precision else precision,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    for folder in folders:
        print(f"{printable(str(folder))}: unproven until it first loads on a GPU")
    _say_next(options, "onnxruntime --device cuda")
    return 0


def _say_next(options: argparse.Namespace, backend: str) -> None:
    where = "on the target: " if options.targets or options.backend == "onnxruntime" else ""
    bundle = printable(shlex.quote(str(options.bundle)))
    print(f"next: {where}sam3rt verify {bundle} --backend {backend}")


def _print(engine: EngineFile, evidence: PlanEvidence | None) -> None:
    sidecar = engine.sidecar
    print(f"{printable(str(engine.path))}: {sidecar.state}, {sidecar.engine.bytes / 1e6:.1f} MB")
    print("  plan: " + ("unknown" if evidence is None else evidence.summary()))
    for name, value in sidecar.parity.items():
        print(f"  {name}: {value:.6g}")


def _capability(text: str) -> str:
    """``8.9``, ``sm89`` or ``sm_120`` as ``8.9`` and ``12.0``."""
    match = re.fullmatch(r"(?:sm_?)?([1-9]\d??)\.?(\d)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.9")
    return f"{match.group(1)}.{match.group(2)}"
