"""``sam3rt export``: a checkpoint to a bundle."""

from __future__ import annotations

import argparse
import shlex
import sys

from sam3rt.cli.options import named_path, printable
from sam3rt.errors import BackendError
from sam3rt.image_files import read_image

HELP = "turn a checkpoint into a bundle (needs the export extra)"
DESCRIPTION = """\
Turn a checkpoint into a bundle: encoder and decoder as ONNX, bundle.json, a parity record.

CHECKPOINT is a file (pickled or .safetensors, FP64, FP32, FP16 or BF16), a
.safetensors.index.json, a folder or a hub id:

  accepted                                      licence of the weights
  SAM 3: Meta's sam3.pt; facebook/sam3          SAM License
  SAM 3.1: sam3.1_multiplex.pt; facebook/sam3.1 SAM License
  SAM 3, fine-tuned without its tracker         SAM License
    (official trainer): with --tracker sam3.pt
  SAM 3 with a LoRA adapter of PEFT: --lora     SAM License, and the adapter's
  EfficientSAM3, SAM 3 or 3.1: RepViT m0.9,     SAM License (SAM 3's neck and decoder
    m1.1, m2.3; TinyViT 5m, 11m, 21m;           are in the file)
    EfficientViT b0, b1, b2 (its own
    fine-tuned files: with --tracker sam3.pt)
  SAM 2.1, SAM 2: sam2.1_hiera_*.pt (tiny,      Apache-2.0
    small, base_plus, large), sam2_hiera_*.pt;
    facebook/sam2.1-hiera-tiny and the like
  MobileSAM: mobile_sam.pt                      Apache-2.0

  refused                                       because
  SAM 1                                         another image encoder
  SAM 2 of other sizes than those, as a .pt     shapes do not show its heads and windows:
                                                pass a transformers folder
  SAM 3's detector alone                        it has no decoder for clicks: --tracker
  SAM 3.1's propagation decoder alone           it answers no clicks
  adapters in the weights' own file             they would be left out: --lora
  quantized weights                             export what they were made from

The exported graphs are run in ONNX Runtime and compared with the PyTorch model; a bundle that
differs is not written. The published SAM 3 takes a few minutes and about 9 GB of memory on a CPU.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "checkpoint", type=_checkpoint, metavar="CHECKPOINT", help="file, folder or hub id"
    )
    parser.add_argument(
        "--output", type=named_path, required=True, metavar="BUNDLE", help="bundle folder to make"
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
        type=named_path,
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
        "--tracker",
        type=named_path,
        metavar="FILE",
        help="checkpoint to take the decoder for clicks from (and its neck, where CHECKPOINT has "
        "none), such as sam3.pt",
    )
    parser.add_argument(
        "--lora",
        type=named_path,
        metavar="ADAPTER",
        help="PEFT adapter to merge: a .safetensors file or a folder",
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="ALPHA",
        help="its lora_alpha (default: that of the adapter_config.json beside it)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the encoder's input, pixels: 336, 672 or 1008 for SAM 3 and EfficientSAM3 "
        "(default: 1008), a multiple of 32 for SAM 2 (default: 1024). What a "
        "smaller one costs in accuracy is not known",
    )
    parser.add_argument(
        "--license", metavar="NAME", help="licence of the weights, for the manifest"
    )
    parser.add_argument(
        "--license-file", type=named_path, metavar="FILE", help="its text, copied into the bundle"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def _checkpoint(text: str) -> str:
    """A path or a hub id, as it is written; not an empty text, which means the folder here."""
    named_path(text)
    return text


def run(options: argparse.Namespace) -> int:
    """Export."""
    try:
        from . import ExportOptions, SourceOptions, export_bundle
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
            source=SourceOptions(
                weights_key=options.weights_key,
                tracker=options.tracker,
                lora=options.lora,
                lora_alpha=options.lora_alpha,
                image_size=options.image_size,
            ),
        ),
        # Also where nobody watches: an export takes minutes, and a log should show them.
        progress=lambda line: print(printable(line), file=sys.stderr, flush=True),
    )
    manifest = bundle.manifest
    print(f"{printable(str(bundle.path))}: {manifest.name}, fingerprint {manifest.fingerprint}")
    for role, graph in (("encoder", manifest.encoder), ("decoder", manifest.decoder)):
        size = sum(entry.bytes for entry in (graph.model, *graph.external_data))
        print(f"  {role}: {graph.nodes} nodes, {size / 1e6:.1f} MB, opset {graph.opset}")
    path = printable(shlex.quote(str(options.output)))
    print(f"next: sam3rt segment photo.jpg --point 225,150 --bundle {path} --output masks")
    print(f"      sam3rt build {path}  (on an NVIDIA GPU, for TensorRT)")
    return 0
