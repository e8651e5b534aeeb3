"""``sam3rt export``: a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from sam3rt.cli.options import progress_printer
from sam3rt.errors import BackendError
from sam3rt.image_files import read_image

HELP = "turn a checkpoint into a bundle (needs the export extra)"
DESCRIPTION = """\
Turn a checkpoint into a bundle: encoder and decoder as ONNX, bundle.json, a parity record.

CHECKPOINT is Meta's sam3.pt or sam3.1_multiplex.pt (or a model of another size in the same
naming), MobileSAM's mobile_sam.pt, any of these as .safetensors, or a transformers folder or hub
id such as facebook/sam3. The exported graphs are run in ONNX Runtime and compared with the
PyTorch model; a bundle that differs is not written.
The published SAM 3 takes a few minutes and about 9 GB of memory on a CPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, folder or hub id")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="BUNDLE", help="bundle folder to make"
    )
    parser.add_argument("--name", help="name of the model (default: sam3 or mobile_sam)")
    parser.add_argument(
        "--weights",
        choices=("float32", "float16"),
        default="float32",
        help="type the weights are stored in; float16 halves the files at about 1e-3 of the "
        "outputs' accuracy (default: float32)",
    )
    parser.add_argument(
        "--parity-image",
        dest="parity_images",
        action="append",
        default=[],
        type=Path,
        metavar="IMAGE",
        help="small image to compare on and to store in the parity record; repeatable "
        "(default: two drawn scenes)",
    )
    parser.add_argument(
        "--weights-key",
        metavar="KEY",
        help="which dict to take from a file that holds several models, such as ema",
    )
    parser.add_argument(
        "--license", metavar="NAME", help="licence of the weights, for the manifest"
    )
    parser.add_argument(
        "--license-file", type=Path, metavar="FILE", help="its text, copied into the bundle"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def run(options: argparse.Namespace) -> int:
    """Export."""
    try:
        from . import ExportOptions, export_bundle
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        raise BackendError(
            f"the export needs {missing}: pip install 'sam3rt[export,cpu]'"
        ) from error
    except (ImportError, OSError) as error:  # a library that is there and does not load
        raise BackendError(f"the export's libraries cannot be loaded: {error}") from error
    bundle = export_bundle(
        options.checkpoint,
        options.output,
        ExportOptions(
            name=options.name,
            weights=options.weights,
            parity_images=[read_image(path) for path in options.parity_images],
            license=options.license,
            license_path=options.license_file,
            overwrite=options.overwrite,
            weights_key=options.weights_key,
        ),
        progress=progress_printer(),
    )
    manifest = bundle.manifest
    print(f"{bundle.path}: {manifest.name}, fingerprint {manifest.fingerprint}")
    for role, graph in (("encoder", manifest.encoder), ("decoder", manifest.decoder)):
        size = sum(entry.bytes for entry in (graph.model, *graph.external_data))
        print(f"  {role}: {graph.nodes} nodes, {size / 1e6:.1f} MB, opset {graph.opset}")
    return 0
