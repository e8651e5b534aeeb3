"""``sam3rt info``: what a bug report needs to know."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

from .._version import __version__
from ..backends.table import TABLE
from ..backends.tensorrt.driver import probe_all
from ..backends.tensorrt.engines import find_engines
from ..bundle import Bundle, Manifest, open_bundle
from ..bundle.default import default_bundle_path
from ..errors import BackendError, BundleError
from ..machine import memory_gb, package_versions, processor_name, usable_cores
from .options import add_bundle_argument, printable

HELP = "show versions, backends and a bundle's description"
DESCRIPTION = "Show this installation's versions, the backends that can run here, and a bundle."

# What changes how the libraries below sam3rt run.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


_FAMILIES = {
    "sam3": "SAM 3 or 3.1",
    "efficient_sam3": "EfficientSAM3: a small image encoder, SAM 3's neck and decoder",
    "sam2": "SAM 2 or 2.1",
    "mobile_sam": "MobileSAM: SAM 1's decoder with a TinyViT",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    add_bundle_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the information."""
    path = default_bundle_path() if options.bundle is None else options.bundle
    information: dict[str, Any] = {
        "sam3rt": __version__,
        "installed_at": str(Path(__file__).resolve().parents[1]),
        "machine": _machine(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "packages": package_versions(),
        "onnxruntime_providers": _providers(),
        "backends": _backends(),
        "gpus": _gpus(),
    }
    problem: BundleError | None = None
    try:
        bundle = open_bundle(path, check_files=False)
    except BundleError as error:  # the bug may be just this: everything else is shown
        problem = error
        information["bundle"] = {"path": str(path), "problem": str(error)}
    else:
        information |= {
            "openvino_recipes": _recipes(bundle),
            "bundle": _bundle(bundle.path, bundle.manifest) | {"files": _files(bundle)},
            "engines": _engines(bundle),
        }
    if options.json:
        print(json.dumps(information, indent=2))
    else:
        _print(information, "")
    if problem is not None:
        raise problem
    return 0


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "architecture": platform.machine(),
        "processor": processor_name(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_gb": memory_gb(),
    }


def _backends() -> dict[str, str]:
    """Whether each backend's libraries can be imported; nothing is loaded onto a device."""
    return {entry.name: entry.problem() or "can be imported" for entry in TABLE}


def _files(bundle: Bundle) -> str:
    try:
        bundle.check_files()
    except BundleError as error:
        return str(error)
    return "match their hashes"


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    from ..backends.onnxruntime.recipes import providers

    return providers()


def _recipes(bundle: Bundle) -> dict[str, str]:
    if importlib.util.find_spec("openvino") is None:
        return {}
    from ..backends.openvino import known_recipes

    return known_recipes(bundle)


def _gpus() -> list[str]:
    try:
        devices = probe_all()
    except BackendError:
        return []
    return [
        f"{device.gpu.name} (compute capability {device.gpu.compute_capability}, "
        f"{device.total_memory / 1e9:.1f} GB, driver {device.driver_version})"
        for device in devices
    ]


def _engines(bundle: Bundle) -> list[str]:
    return [
        f"{engine.path.relative_to(bundle.path)} ({engine.sidecar.state}, "
        f"{engine.sidecar.engine.bytes / 1e6:.1f} MB)"
        for engine in find_engines(bundle)
    ]


def _bundle(path: Path, manifest: Manifest) -> dict[str, Any]:
    height, width = manifest.image.size
    graphs = {
        role: f"{graph.nodes} nodes, opset {graph.opset}, "
        f"{sum(e.bytes for e in (graph.model, *graph.external_data)) / 1e6:.1f} MB"
        for role, graph in (("encoder", manifest.encoder), ("decoder", manifest.decoder))
    }
    return {
        "path": str(path),
        "name": manifest.name,
        "model_type": manifest.model_type,
        "family": _FAMILIES[manifest.model_type],
        "fingerprint": manifest.fingerprint,
        "format_version": manifest.format_version,
        "input": f"{width}x{height}, resize {manifest.image.resize}",
        "low_resolution_masks": "x".join(map(str, manifest.masks.low_res_size[::-1])),
        "weights": manifest.weights,
        **graphs,
        "source": manifest.source.reference
        + f" (as {manifest.source.kind})" * (manifest.source.kind != manifest.source.reference),
        "source_weights": manifest.source.weights or "not noted",
        "notes": list(manifest.source.notes),
        "license": manifest.source.license,
        "producer": manifest.producer,
    }


def _print(value: dict[str, Any], indent: str) -> None:
    for name, entry in value.items():
        if isinstance(entry, dict) and entry:
            print(f"{indent}{name}:")
            _print(entry, indent + "  ")
        else:
            text = ", ".join(map(str, entry)) if isinstance(entry, list) else str(entry or "")
            print(f"{indent}{name}: {printable(text) or 'none'}")
