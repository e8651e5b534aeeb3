"""``sam3rt bench``: how fast, how right, and how far from the limit."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from sam3rt.cli.options import add_bundle_argument, named_path, number, positive_int, printable
from sam3rt.errors import BackendError, InvalidInputError
from sam3rt.image_files import read_image

from . import PARTS, PLOTS, RESULT

HELP = "measure a bundle on this machine, side by side with PyTorch, or compare two results"
DESCRIPTION = """\
Measure a bundle on this machine: stages apart and end to end, ways of running it side by side,
curves, fresh processes, and the distance to what the machine can do at most.

Ways of running it are BACKEND or BACKEND:PRECISION, such as onnxruntime or openvino:fp32. PyTorch
(pytorch:fp32, pytorch:bf16, pytorch:compile-fp32, pytorch:compile-bf16) needs the export's extra
and --checkpoint, the model the bundle was exported from. Masks of all of them are compared with
FP32's.

Writes to the output folder, and again after each part, so that a run that is stopped leaves what
it had:
  bench.json        everything; its schema is printed by --schema
  bench.md          as tables
  *.png             as pictures, where matplotlib is installed

With --compare: two such JSON files. Exits with 1 where the second is slower or further from FP32.
"""

# Seconds that a quick look takes at most, unless loading alone takes longer.
_QUICK_SECONDS = 110.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_bundle_argument(parser)
    parser.add_argument(
        "--output",
        type=named_path,
        metavar="DIR",
        help="folder for the results (default: print only)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results in the output folder"
    )
    parser.add_argument(
        "--candidate",
        dest="candidates",
        action="append",
        default=[],
        metavar="BACKEND[:PRECISION]",
        help="what to measure; repeatable (default: everything that works here)",
    )
    parser.add_argument(
        "--checkpoint", type=named_path, metavar="FILE", help="the PyTorch model, to run it beside"
    )
    parser.add_argument(
        "--only",
        "--parts",
        dest="parts",
        metavar="PART",
        help=f"comma-separated, of {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look, no report: few repetitions, and in two minutes what fits into them",
    )
    parser.add_argument(
        "--repetitions", type=positive_int, help="rounds at most (default: 50; 5 with --quick)"
    )
    parser.add_argument(
        "--seconds",
        type=positive_int,
        help="seconds per table after which no round begins (default: 60; 2 with --quick)",
    )
    parser.add_argument(
        "--image", type=named_path, metavar="IMAGE", help="(default: a drawn scene)"
    )
    parser.add_argument(
        "--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N" (default: auto)'
    )
    parser.add_argument(
        "--threads", type=positive_int, help="CPU threads (default: left to each candidate)"
    )
    parser.add_argument(
        "--note", default="", help="what a reader must know, such as that weights are synthetic"
    )
    parser.add_argument(
        "--compare", nargs=2, type=named_path, metavar=("BEFORE", "AFTER"), help="two JSON results"
    )
    parser.add_argument(
        "--tolerance",
        type=number,
        default=0.1,
        help="share by which a median may grow in a comparison (default: 0.1)",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of results")


def run(options: argparse.Namespace) -> int:
    """Measure, or compare."""
    from .document import json_schema

    if options.schema:
        print(json.dumps(json_schema(), indent=2))
        return 0
    return _compare(options) if options.compare else _measure(options)


def _measure(options: argparse.Namespace) -> int:
    from sam3rt.bundle import open_bundle
    from sam3rt.bundle.default import default_bundle_path
    from sam3rt.bundle.files import atomic_write

    from .candidates import Settings, default_choices, parse_choice
    from .document import Result, write_result
    from .markdown import summary, to_markdown
    from .plots import draw_plots
    from .runner import Plan, run_benchmark
    from .scene import FULL_HD, draw_scene
    from .timing import Effort

    begin = time.perf_counter()
    quick = options.quick
    parts = PARTS if options.parts is None else tuple(map(str.strip, options.parts.split(",")))
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InvalidInputError("--only", repr(unknown[0]), f"some of {', '.join(PARTS)}")
    choices = [parse_choice(text) for text in options.candidates] or default_choices(
        options.checkpoint is not None
    )
    if options.checkpoint is not None and not options.checkpoint.exists():
        raise InvalidInputError(
            "--checkpoint", f"{options.checkpoint}, which is not there", "a model"
        )
    if quick and not options.candidates:  # compiling alone takes minutes
        choices = [choice for choice in choices if not choice.precision.startswith("compile")]
    if len(set(choices)) != len(choices):
        raise InvalidInputError("--candidate", "the same twice", "each once")
    plan = Plan(
        bundle=open_bundle(options.bundle or default_bundle_path()),
        choices=tuple(choices),
        settings=Settings(options.device, options.threads, options.checkpoint),
        parts=parts,
        image=draw_scene(*FULL_HD) if options.image is None else read_image(options.image),
        effort=Effort(
            repetitions=options.repetitions or (5 if quick else 50),
            seconds=options.seconds or (2 if quick else 60),
            warm_up=0 if quick else 3,
            fewest=1 if quick else 3,
        ),
        budget=_QUICK_SECONDS if quick else None,
        command=_command(options),
        note=options.note,
    )
    shown = printable(str(options.output))
    if options.output is not None:
        _make_room(options.output, options.overwrite)

    def keep(result: Result) -> None:
        if options.output is not None:
            write_result(options.output / RESULT, result)
            with atomic_write(options.output / "bench.md") as stream:
                stream.write(to_markdown(result).encode())

    try:
        result = run_benchmark(plan, lambda line: print(line, file=sys.stderr, flush=True), keep)
    except KeyboardInterrupt:
        if options.output is not None:
            print(f"stopped; what was measured is in {shown}", file=sys.stderr)
        raise
    finally:
        claim = options.output and options.output / RESULT
        if claim and claim.exists() and not claim.stat().st_size:
            claim.unlink()  # nothing was measured
    print(to_markdown(result))
    if options.output is not None:
        try:
            draw_plots(result, options.output)
        except BackendError as error:
            print(error, file=sys.stderr)
    print(summary(result, time.perf_counter() - begin))
    if options.output is not None:
        print(f"written to {shown}: bench.md, bench.json and plots")
    return 0


def _make_room(folder: Path, overwrite: bool) -> None:
    """Make the folder for results, without those of an earlier run, which may have other parts.

    It gets an empty result, so that no other run takes it before the first part is measured.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        (folder / RESULT).unlink(missing_ok=True)
    try:
        (folder / RESULT).touch(exist_ok=False)
    except FileExistsError:
        expected = "another folder, or --overwrite"
        raise InvalidInputError("--output", f"{folder}, which holds {RESULT}", expected) from None
    for name in ("bench.md", *(f"{plot}.png" for plot in PLOTS)):
        (folder / name).unlink(missing_ok=True)


def _compare(options: argparse.Namespace) -> int:
    from sam3rt.arguments import number as least

    from .compare import (
        compare_results,
        lost_agreement,
        missing_rows,
        same_conditions,
        to_markdown,
    )
    from .document import read_result

    before, after = (read_result(path) for path in options.compare)
    least("--tolerance", options.tolerance, 0.0)
    for line in same_conditions(before, after):
        print(f"not the same {line}")
    changes = compare_results(before, after, options.tolerance)
    if not changes:
        raise InvalidInputError("--compare", "results without a common row", "the same candidates")
    print(to_markdown(changes))
    slower = sum(change.is_slower for change in changes)
    lost = lost_agreement(before, after)
    for line in [*lost, *missing_rows(before, after)]:
        print(line)
    faster = sum(change.is_faster for change in changes)
    print(f"{len(changes)} rows: {slower} slower, {faster} faster")
    return 1 if slower or lost else 0


def _command(options: argparse.Namespace) -> str:
    """The command, with files by their names alone: folders say nothing on another machine."""
    words = ["sam3rt", "bench"]
    if options.bundle is not None:
        words.append(options.bundle.name)
    for name in options.candidates:
        words += ["--candidate", name]
    for option, value in (
        ("--checkpoint", options.checkpoint and options.checkpoint.name),
        ("--only", options.parts),
        ("--repetitions", options.repetitions),
        ("--seconds", options.seconds),
        ("--image", options.image and options.image.name),
        ("--device", options.device if options.device != "auto" else None),
        ("--threads", options.threads),
        ("--output", options.output and options.output.name),
    ):
        if value is not None:
            words += [option, str(value)]
    if options.quick:
        words.append("--quick")
    return shlex.join(words)
