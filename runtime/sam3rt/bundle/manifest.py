"""Bundles: a folder with two ONNX graphs and everything a consumer must know about them.

``bundle.json`` is the contract between the export, this runtime and any other consumer. It
holds sizes, the resize rule, normalization, tensor names, prompt rules, file hashes, versions
and the licence, so that reading it needs a JSON parser and nothing else.

The fingerprint is the SHA-256 of ``bundle.json`` itself with the 64 digits of the fingerprint
replaced by zeros. As the manifest holds every file's hash, the fingerprint stands for the whole
bundle, and binds its encoder to its decoder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from ..errors import BundleError
from .documents import Number, parse_document, read_as
from .files import MANIFEST, FileEntry, atomic_write, check_file
from .names import find_bundle

FORMAT = "sam3rt-bundle"
FORMAT_VERSION = 1
NO_FINGERPRINT = "0" * 64

# Names that mean a plain file on every system: no separators or drives, no final dot (Windows drops
# it), and none of Windows' devices, which stay devices with any ending.
_SAFE_NAME = re.compile(
    r"(?!(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\.|$))[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9_-])?",
    re.IGNORECASE | re.ASCII,
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# A manifest lists two graphs and their tensors; anything near this size is not one of ours.
_MAX_MANIFEST_BYTES = 1 << 20


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One input or output of a graph.

    Attributes:
        name: its ONNX name.
        dtype: its NumPy dtype name.
        shape: sizes; a string names a dynamic axis.
    """

    name: str
    dtype: Literal["float32", "float16", "int64", "int32", "bool"]
    shape: tuple[int | str, ...]


class GraphSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph.

    Attributes:
        model: the ``.onnx`` file.
        external_data: files that hold its weights, empty where they are inside.
        opset: its ONNX opset.
        nodes: how many nodes it has.
        inputs: its inputs, in order.
        outputs: its outputs, in order.
    """

    model: FileEntry
    external_data: tuple[FileEntry, ...]
    opset: int
    nodes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class ImageSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes the encoder's input.

    Attributes:
        size: (height, width) of the encoder's input, pixels.
        resize: ``"stretch"`` ignores the aspect ratio (SAM 3); ``"longest_side"`` keeps it and
            pads at the bottom and right (MobileSAM).
        resize_dtype: ``"float32"`` resizes unrounded values; ``"uint8"`` rounds to whole levels.
            Either way the filter is antialiased bilinear.
        mean: per RGB channel, on the 0..255 scale.
        std: per RGB channel, on the 0..255 scale.
        pad_value: value of padding, applied after normalization.
    """

    size: tuple[int, int]
    resize: Literal["stretch", "longest_side"]
    resize_dtype: Literal["float32", "uint8"]
    mean: tuple[Number, Number, Number]
    std: tuple[Number, Number, Number]
    pad_value: Number = 0.0


class PromptSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """How prompts become labelled points.

    Labels are SAM's: 1 foreground, 0 background, -1 not a point, 2 and 3 a box's top left and
    bottom right corner.

    Attributes:
        box_position: where a box's corners stand relative to the clicks.
        padding_point: when one point (0, 0) labelled -1 is appended: ``"always"`` where there is
            any point or box (SAM 3), or only ``"without_box"`` (MobileSAM). Without any point
            and box there is never one.
        mask_size: (height, width) of a mask prompt.
    """

    box_position: Literal["before_points", "after_points"]
    padding_point: Literal["always", "without_box"]
    mask_size: tuple[int, int]


class MaskSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """What the decoder returns and how it is brought to the image's size.

    Attributes:
        multimask: masks per object in a multi-mask call.
        low_res_size: (height, width) of the low-resolution logits.
        low_res_limit: returned low-resolution logits are clamped to plus or minus this;
            ``None`` leaves them.
        upsampling: ``"direct"`` resizes to the original size (SAM 3); ``"unpad"`` resizes to
            the encoder's input size, crops the padding, then resizes (MobileSAM).
        max_hole_area: the hole area the model's own predictor fills unless told otherwise,
            low-resolution pixels: 256 for SAM 3, 0 for MobileSAM, which fills none.
    """

    multimask: int
    low_res_size: tuple[int, int]
    low_res_limit: Number | None
    upsampling: Literal["direct", "unpad"]
    max_hole_area: Number


class SourceSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from.

    Attributes:
        kind: checkpoint format.
        reference: file name, hub id or description.
        sha256: hash of the checkpoint file, empty where there was none.
        license: SPDX identifier or name.
        license_file: the licence's text in the bundle, or ``None``.
        weights: type the checkpoint stores its weights in, such as ``"bfloat16"``; empty where it
            is not known, as in bundles made before it was noted.
        notes: what a user should know of how the model came about, such as other files that
            parts of it are from.
    """

    kind: str
    reference: str
    sha256: str
    license: str
    license_file: FileEntry | None = None
    weights: str = ""
    notes: tuple[str, ...] = ()


class ParityLimits(Struct, frozen=True, forbid_unknown_fields=True):
    """How far outputs may be from the parity record's FP32 reference.

    Attributes:
        feature_error: largest absolute difference of a feature map, relative to the map's
            largest absolute value.
        feature_cosine: least cosine similarity of a feature map.
        logit_error: largest absolute difference of mask logits, relative to the largest
            absolute logit of the reference.
        iou_error: largest absolute difference of predicted IoUs.
        mask_iou: least mean IoU of a call's masks with the reference's.
    """

    feature_error: Number
    feature_cosine: Number
    logit_error: Number
    iou_error: Number
    mask_iou: Number

    @property
    def least_mask_iou(self) -> float:
        """Least IoU of any single mask.

        Five times the mean's allowance: a mask of some hundred pixels loses a percent to a few
        of them whose logits are next to zero, and a wrong mask loses far more.
        """
        return 1.0 - 5.0 * (1.0 - self.mask_iou)


# Beyond these a graph is broken, whatever its manifest allows: they are what is asked of types
# narrower than FP32. No export allows more, and most of them a hundred times less.
LOOSEST_LIMITS = ParityLimits(
    feature_error=0.1, feature_cosine=0.999, logit_error=0.1, iou_error=0.05, mask_iou=0.99
)


class ParitySpec(Struct, frozen=True, forbid_unknown_fields=True):
    """The parity record and what it asks for.

    Attributes:
        record: the ``.npz`` file with inputs and expected outputs.
        limits: the differences allowed.
    """

    record: FileEntry
    limits: ParityLimits


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``bundle.json``; see the classes of its fields.

    Attributes:
        format: always ``"sam3rt-bundle"``.
        format_version: 1; a runtime refuses versions newer than it knows.
        fingerprint: see the module's documentation.
        export_id: stands in the metadata of both graphs as ``sam3rt.export_id``.
        name: what the model is called.
        model_type: family of the model.
        weights: type the weights are stored in; computation is FP32 either way.
        producer: versions of the software that wrote the bundle.
    """

    format: str
    format_version: int
    fingerprint: str
    export_id: str
    name: str
    model_type: Literal["sam3", "efficient_sam3", "sam2", "mobile_sam"]
    weights: Literal["float32", "float16"]
    source: SourceSpec
    image: ImageSpec
    prompts: PromptSpec
    masks: MaskSpec
    encoder: GraphSpec
    decoder: GraphSpec
    parity: ParitySpec
    producer: dict[str, str] = {}

    def files(self) -> tuple[FileEntry, ...]:
        """Every file the manifest vouches for."""
        entries = [self.encoder.model, *self.encoder.external_data]
        entries += [self.decoder.model, *self.decoder.external_data, self.parity.record]
        if self.source.license_file is not None:
            entries.append(self.source.license_file)
        return tuple(entries)


@dataclass(frozen=True)
class Bundle:
    """A bundle folder whose manifest has been read and checked.

    Attributes:
        path: the folder.
        manifest: its description.
    """

    path: Path
    manifest: Manifest

    def file(self, entry: FileEntry) -> Path:
        """Where a file of the bundle lies."""
        return self.path / entry.file

    def check_files(self) -> None:
        """Compare every file with the length and hash in the manifest.

        Raises:
            BundleError: naming the first file that is missing, cut or changed.
        """
        for entry in self.manifest.files():
            check_file(self.path, entry)


def open_bundle(path: str | Path, *, check_files: bool = True) -> Bundle:
    """Read a bundle's manifest and check it against itself and, by default, its files.

    Args:
        path: the bundle folder, or its name; see :mod:`sam3rt.bundle.names`.
        check_files: also hash every file (about a second per 2 GB).

    Raises:
        BundleError: the folder or a file is missing, damaged, tampered with, mixed from
            different exports, or of a newer format; the message names the file.
    """
    folder = find_bundle(path)
    if not folder.is_dir():
        raise BundleError(f"no bundle folder at {folder}")
    manifest_path = folder / MANIFEST
    try:
        if not manifest_path.is_file():
            raise BundleError(f"is missing from {folder}: not a sam3rt bundle", MANIFEST)
        if manifest_path.stat().st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"is larger than {_MAX_MANIFEST_BYTES} bytes", MANIFEST)
        raw = manifest_path.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot be read: {error}", MANIFEST) from error
    bundle = Bundle(folder, parse_manifest(raw))
    if check_files:
        bundle.check_files()
    return bundle


def parse_manifest(raw: bytes) -> Manifest:
    """Parse and validate the content of ``bundle.json``.

    Raises:
        BundleError: it is not JSON, not a bundle manifest, newer than this runtime, breaks a
            rule, or does not match its own fingerprint.
    """
    advice = "update sam3rt or export the model again"
    document = parse_document(raw, MANIFEST, FORMAT, FORMAT_VERSION, advice)
    manifest = read_as(Manifest, document, MANIFEST)
    _check_rules(manifest)
    expected = fingerprint_of(raw, manifest.fingerprint)
    if expected != manifest.fingerprint:
        raise BundleError(
            f"does not match its fingerprint {manifest.fingerprint[:16]}...: it was edited or cut",
            MANIFEST,
        )
    return manifest


def fingerprint_of(raw: bytes, current: str) -> str:
    """The fingerprint of a manifest's bytes, which hold ``current`` as theirs."""
    blank = raw.replace(current.encode(), NO_FINGERPRINT.encode(), 1)
    return hashlib.sha256(blank).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write ``bundle.json`` with its fingerprint filled in.

    Returns:
        The manifest as written.
    """
    blank = msgspec.structs.replace(manifest, fingerprint=NO_FINGERPRINT)
    document = msgspec.to_builtins(blank)
    for name in ("weights", "notes"):  # earlier versions know neither, and need not
        if not document["source"][name]:
            del document["source"][name]
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    final = text.replace(NO_FINGERPRINT, fingerprint, 1)
    with atomic_write(folder / MANIFEST) as stream:
        stream.write(final.encode())
    return msgspec.structs.replace(manifest, fingerprint=fingerprint)


def _check_rules(manifest: Manifest) -> None:
    """What the types alone do not say."""
    for name, digest in (
        ("fingerprint", manifest.fingerprint),
        ("export_id", manifest.export_id),
        *((f"sha256 of {entry.file}", entry.sha256) for entry in manifest.files()),
    ):
        if not _SHA256.fullmatch(digest):
            raise BundleError(f'"{name}" is not a SHA-256', MANIFEST)
    names = [entry.file for entry in manifest.files()]
    for name in names:
        if not _SAFE_NAME.fullmatch(name) or name.lower() == MANIFEST:
            raise BundleError(f"file name {name!r} is not allowed in a bundle", MANIFEST)
    # Windows and macOS take names that differ in case only for the same file.
    if len({name.lower() for name in names}) != len(names):
        raise BundleError("lists one file twice", MANIFEST)
    if any(entry.bytes < 0 for entry in manifest.files()):
        raise BundleError("lists a file with a negative length", MANIFEST)
    sizes = (manifest.image.size, manifest.prompts.mask_size, manifest.masks.low_res_size)
    if any(not 1 <= side <= 1 << 16 for size in sizes for side in size):
        raise BundleError("has an image or mask size outside 1..65536", MANIFEST)
    if any(value <= 0 for value in manifest.image.std):
        raise BundleError("has a standard deviation that is not positive", MANIFEST)
    if manifest.masks.multimask < 1:
        raise BundleError('"masks.multimask" is not positive', MANIFEST)
    if manifest.masks.max_hole_area < 0:
        raise BundleError('"masks.max_hole_area" is negative', MANIFEST)
    if manifest.image.resize == "longest_side" and len(set(manifest.image.size)) != 1:
        raise BundleError("resizes by the longest side to an input that is not square", MANIFEST)
    if len(manifest.encoder.inputs) != 1 or not manifest.encoder.outputs:
        raise BundleError("has an encoder that does not make feature maps of one input", MANIFEST)
    for spec in manifest.encoder.outputs:
        fixed = [side for side in spec.shape[1:] if isinstance(side, int) and 1 <= side <= 1 << 16]
        if len(spec.shape) != 4 or len(fixed) != 3:
            raise BundleError(f"feature map {spec.name!r} is not [B, C, h, w]", MANIFEST)
    limit = manifest.masks.low_res_limit
    if limit is not None and limit <= 0:
        raise BundleError('"masks.low_res_limit" is not positive', MANIFEST)
    loosest = msgspec.structs.asdict(LOOSEST_LIMITS)
    for name, value in msgspec.structs.asdict(manifest.parity.limits).items():
        is_loose = value > loosest[name] if name.endswith("error") else value < loosest[name]
        if is_loose:
            raise BundleError(
                f'"parity.limits.{name}" is {value}, wider than {loosest[name]}', MANIFEST
            )
