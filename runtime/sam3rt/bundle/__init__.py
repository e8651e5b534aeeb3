"""Bundles: the folder with two ONNX graphs and everything a consumer must know about them."""

from __future__ import annotations

from .files import MANIFEST, FileEntry, check_file, check_length, file_entry, is_inside
from .manifest import (
    FORMAT,
    FORMAT_VERSION,
    LOOSEST_LIMITS,
    NO_FINGERPRINT,
    Bundle,
    GraphSpec,
    ImageSpec,
    Manifest,
    MaskSpec,
    ParityLimits,
    ParitySpec,
    PromptSpec,
    SourceSpec,
    TensorSpec,
    fingerprint_of,
    open_bundle,
    parse_manifest,
    write_manifest,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "LOOSEST_LIMITS",
    "MANIFEST",
    "NO_FINGERPRINT",
    "Bundle",
    "FileEntry",
    "GraphSpec",
    "ImageSpec",
    "Manifest",
    "MaskSpec",
    "ParityLimits",
    "ParitySpec",
    "PromptSpec",
    "SourceSpec",
    "TensorSpec",
    "check_file",
    "check_length",
    "file_entry",
    "fingerprint_of",
    "is_inside",
    "open_bundle",
    "parse_manifest",
    "write_manifest",
]
