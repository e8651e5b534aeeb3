"""Graphs that were typed for ONNX Runtime's CUDA provider, beside a bundle's engines.

They lie in ``BUNDLE/engines/onnxruntime-<recipe>``, each pair with a file that says what it is.
They are made from a bundle on any machine, and run on every NVIDIA GPU: what they compute there,
the gate finds out at the first load.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ...bundle import Bundle, FileEntry, GraphSpec, is_inside
from ...bundle.contract import is_feature_name
from ...bundle.documents import as_document, parse_document, read_as
from ...bundle.files import atomic_write
from ...errors import BundleError
from ..table import ENGINES

_LOG = logging.getLogger(__name__)

FP32, TF32 = "fp32", "tf32"
FORMAT = "sam3rt-typed-graphs"
FORMAT_VERSION = 1
SIDECAR = "graphs.json"
# Fastest first.
TYPED_ORDER = ("fp16-activations", "fp16", "bf16")
# Built and loaded where they are named only. BF16 is eight times as coarse as FP16: it is for
# weights whose results leave FP16's range, and what "auto" takes there is TF32.
ON_REQUEST = ("bf16",)
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Graphs:
    """Two graphs, and how they compute.

    Attributes:
        bundle: the folder that they lie in, and a manifest that describes them.
        precision: what they compute in: ``"fp32"``, ``"tf32"`` or the name of a recipe.
        tf32: whether CUDA may round the factors of FP32 products to TF32.
        narrow: the model files without any FP32 product.
        is_fused: whether they may hold ONNX Runtime's own operators.
        digest: of the files and how they compute, where they are not the bundle's own; else empty.
    """

    bundle: Bundle
    precision: str = FP32
    tf32: bool = False
    is_fused: bool = False
    digest: str = ""
    narrow: tuple[str, ...] = ()

    def allows_tf32(self, graph: GraphSpec) -> bool:
        """Whether CUDA may use TF32 in one of them.

        Where there is no FP32 product, that changes none. It must be allowed all the same: ONNX
        Runtime keeps FP16 convolutions off the tensor cores, too, where TF32 is not.
        """
        return self.tf32 or graph.model.file in self.narrow


class TypedSidecar(Struct, frozen=True, forbid_unknown_fields=True):
    """What is on record about two typed graphs.

    Attributes:
        bundle_fingerprint: of the bundle that they were made from.
        recipe: one of :data:`TYPED_ORDER`.
        tf32: whether what they leave in FP32 may be multiplied in TF32.
        narrow: the model files without any FP32 product.
        features_dtype: type of the feature maps between the two.
        encoder: its file, and those beside it that hold weights.
        decoder: likewise.
        format: always ``"sam3rt-typed-graphs"``.
        format_version: 1; a runtime refuses versions newer than it knows.
    """

    bundle_fingerprint: str
    recipe: str
    tf32: bool
    features_dtype: Literal["float16", "float32"]
    encoder: tuple[FileEntry, ...]
    decoder: tuple[FileEntry, ...]
    narrow: tuple[str, ...] = ()
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def typed_folder(bundle: Path, recipe: str) -> Path:
    """Where a bundle's graphs of one recipe lie."""
    return bundle / ENGINES / f"onnxruntime-{recipe}"


def write_typed_sidecar(folder: Path, sidecar: TypedSidecar) -> None:
    """Write what is on record, whole or not at all.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    with atomic_write(folder / SIDECAR) as stream:
        stream.write((json.dumps(as_document(sidecar), indent=2) + "\n").encode())


def find_typed(bundle: Bundle) -> tuple[Graphs, ...]:
    """The typed graphs of a bundle, fastest first.

    Those of another bundle, and those about which nothing can be read, are left out with a warning.
    """
    found = []
    for recipe in TYPED_ORDER:
        folder = typed_folder(bundle.path, recipe)
        if not folder.exists():
            continue
        try:
            found.append(_read(bundle, folder, recipe))
        except BundleError as error:
            _LOG.warning("%s is left out: %s", folder, error)
    return tuple(found)


def _read(bundle: Bundle, folder: Path, recipe: str) -> Graphs:
    path = folder / SIDECAR
    try:
        if not is_inside(path, bundle.path):
            raise BundleError("is a link that leaves the bundle", SIDECAR)
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise BundleError(f"cannot be read: {error}", SIDECAR) from error
    document = parse_document(raw, SIDECAR, FORMAT, FORMAT_VERSION, "update sam3rt or build again")
    sidecar = read_as(TypedSidecar, document, SIDECAR)
    manifest = bundle.manifest
    if sidecar.bundle_fingerprint != manifest.fingerprint:
        raise BundleError("was made from another bundle: build it again", SIDECAR)
    if sidecar.recipe != recipe or not sidecar.encoder or not sidecar.decoder:
        raise BundleError(f"does not describe the graphs of {recipe}", SIDECAR)
    described = msgspec.structs.replace(
        manifest,
        encoder=_retyped(manifest.encoder, sidecar.encoder, sidecar.features_dtype),
        decoder=_retyped(manifest.decoder, sidecar.decoder, sidecar.features_dtype),
    )
    # What a verdict on them is about: the files, and where TF32 is allowed.
    hashes = [entry.sha256 for entry in (*sidecar.encoder, *sidecar.decoder)]
    digest = " ".join([*hashes, *(["TF32"] if sidecar.tf32 else []), *sidecar.narrow])
    return Graphs(Bundle(folder, described), recipe, sidecar.tf32, True, digest, sidecar.narrow)


def _retyped(graph: GraphSpec, files: tuple[FileEntry, ...], features: str) -> GraphSpec:
    """A graph as the manifest describes it, of other files and another type of feature maps."""
    inputs, outputs = (
        tuple(
            msgspec.structs.replace(spec, dtype=features) if is_feature_name(spec.name) else spec
            for spec in specs
        )
        for specs in (graph.inputs, graph.outputs)
    )
    return msgspec.structs.replace(
        graph, model=files[0], external_data=files[1:], inputs=inputs, outputs=outputs
    )
