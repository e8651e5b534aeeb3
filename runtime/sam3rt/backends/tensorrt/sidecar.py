"""The JSON file beside each engine: what it is, where it was built and how it did on the gate.

An engine runs only on the kind of GPU and the TensorRT version it was built for, and only the
bundle it was built from makes sense of its outputs. None of that can be read off the engine
itself without loading it, so it stands in ``<engine file>.json``.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ...bundle import FileEntry
from ...bundle.documents import Number, as_document, parse_document, read_as
from ...bundle.files import atomic_write
from ...errors import BundleError
from .driver import Gpu

FORMAT = "sam3rt-engine"
FORMAT_VERSION = 1

Role = Literal["encoder", "decoder"]
BackendName = Literal["tensorrt", "tensorrt-rtx"]
State = Literal["proven", "unproven", "refused"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# How CUDA numbers a kind of GPU, such as 8.9.
CAPABILITY = re.compile(r"[1-9][0-9]?\.[0-9]")
_MAX_BYTES = 1 << 20


class EngineShapes(Struct, frozen=True, forbid_unknown_fields=True):
    """The greatest sizes an engine takes; each of its dynamic axes starts at 1.

    Attributes:
        max_objects: objects in one decoder call.
        max_points: points per object, padding included.
        max_images: images in one encoder call.
    """

    max_objects: int
    max_points: int
    max_images: int


class EngineSidecar(Struct, frozen=True, forbid_unknown_fields=True):
    """What is on record about one engine.

    Attributes:
        format: always ``"sam3rt-engine"``.
        format_version: 1; a runtime refuses versions newer than it knows.
        role: what the engine computes.
        backend: the TensorRT flavour that built it, and that alone can load it.
        engine: its file beside the sidecar, with hash and length.
        bundle_fingerprint: of the bundle it was built from.
        gpu: where it was built; ``None`` for an ahead-of-time build.
        targets: compute capabilities an ahead-of-time engine was built for; empty for one that
            was built on ``gpu`` and for it alone.
        tensorrt_version: of the builder, in full.
        driver_version: of the machine that built it; ``None`` where there was none.
        recipe: the precision recipe actually built; see ``RECIPE_ORDER``.
        features_dtype: type of the feature maps between encoder and decoder.
        shapes: the greatest sizes it takes.
        state: by the build: ``"proven"`` passed the gate on ``gpu``; ``"refused"`` failed it there;
            ``"unproven"`` did not run.
        parity: the gate's worst figures by name; NaN where an output held one.
        paired_with: for a decoder, SHA-256 of the encoder engine it was proven with.
        build_seconds: how long the build took.
    """

    role: Role
    backend: BackendName
    engine: FileEntry
    bundle_fingerprint: str
    gpu: Gpu | None
    targets: tuple[str, ...]
    tensorrt_version: str
    driver_version: str | None
    recipe: str
    features_dtype: Literal["float16", "float32"]
    shapes: EngineShapes
    state: State
    parity: dict[str, float]
    paired_with: str | None
    build_seconds: Number
    format: str = FORMAT
    format_version: int = FORMAT_VERSION


def sidecar_path(engine: Path) -> Path:
    """Where the sidecar of an engine file lies."""
    return engine.with_name(engine.name + ".json")


def write_sidecar(engine: Path, sidecar: EngineSidecar) -> None:
    """Write the sidecar of an engine file, whole or not at all.

    Figures that are not finite, or beyond 1e30, are written as null and read back as NaN.

    Raises:
        BundleError: the sidecar breaks a rule, such as naming another file than ``engine``.
        OSError: the folder is missing, read-only or full.
    """
    path = sidecar_path(engine)
    _check_rules(sidecar, path)
    document = as_document(sidecar)
    document["parity"] = {
        name: value if math.isfinite(value) and abs(value) <= 1e30 else None
        for name, value in sidecar.parity.items()
    }
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(path) as stream:
        stream.write(text.encode())


def read_sidecar(engine: Path) -> EngineSidecar:
    """Read and check the sidecar of an engine file. The engine itself is not looked at.

    Raises:
        BundleError: the sidecar is missing, damaged, newer than this runtime, or breaks a rule;
            the message names the file.
    """
    path = sidecar_path(engine)
    try:
        if not path.is_file():
            raise BundleError(f"is missing from {path.parent}", path.name)
        if path.stat().st_size > _MAX_BYTES:
            raise BundleError(f"is larger than {_MAX_BYTES} bytes", path.name)
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot be read: {error}", path.name) from error
    advice = "update sam3rt or build the engine again"
    document = parse_document(raw, path.name, FORMAT, FORMAT_VERSION, advice)
    parity = document.get("parity")
    if isinstance(parity, dict):
        document["parity"] = {k: math.nan if v is None else v for k, v in parity.items()}
    sidecar = read_as(EngineSidecar, document, path.name)
    _check_rules(sidecar, path)
    return sidecar


def _check_rules(sidecar: EngineSidecar, path: Path) -> None:
    """What the types alone do not say.

    Raises:
        BundleError: a rule is broken.
    """
    digests = {"engine.sha256": sidecar.engine.sha256, "fingerprint": sidecar.bundle_fingerprint}
    if sidecar.paired_with is not None:
        digests["paired_with"] = sidecar.paired_with
    for name, digest in digests.items():
        if not _SHA256.fullmatch(digest):
            raise BundleError(f'"{name}" is not a SHA-256', path.name)
    if sidecar.paired_with is not None and sidecar.role != "decoder":
        raise BundleError('"paired_with" is for decoders only', path.name)
    if sidecar.engine.file + ".json" != path.name:
        raise BundleError(f"describes {sidecar.engine.file!r}, another file", path.name)
    if sidecar.engine.bytes < 1:
        raise BundleError('"engine.bytes" is not positive', path.name)
    if not _SAFE_NAME.fullmatch(sidecar.recipe) or not _SAFE_NAME.fullmatch(
        sidecar.tensorrt_version
    ):
        raise BundleError("the recipe or the TensorRT version is not a plain name", path.name)
    capabilities = [*sidecar.targets]
    if sidecar.gpu is not None:
        capabilities.append(sidecar.gpu.compute_capability)
    for capability in capabilities:
        if not CAPABILITY.fullmatch(capability):
            raise BundleError(f"{capability!r} is not a compute capability", path.name)
    if sidecar.gpu is None and not sidecar.targets:
        raise BundleError("names neither a GPU nor the targets of the build", path.name)
    if sidecar.gpu is None and sidecar.state != "unproven":
        raise BundleError(f"is {sidecar.state} but names no GPU it ran on", path.name)
    if any(value < 1 for value in msgspec.structs.astuple(sidecar.shapes)):
        raise BundleError('a field of "shapes" is not positive', path.name)
    if not 0 <= sidecar.build_seconds < math.inf:
        raise BundleError('"build_seconds" is not a duration', path.name)
