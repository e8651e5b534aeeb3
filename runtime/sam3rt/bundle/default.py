"""Where the bundled model lies."""

from __future__ import annotations

import contextlib
from importlib import resources
from pathlib import Path

from ..errors import BundleError
from .manifest import MANIFEST

# The wheel maps this package name to engines/mobile_sam of the repository.
_PACKAGE = "sam3rt.default_bundle"


def default_bundle_path() -> Path:
    """The folder of the bundled MobileSAM.

    Raises:
        BundleError: this installation has none.
    """
    beside = Path(__file__).resolve().parents[3] / "engines" / "mobile_sam"
    candidates = [Path(__file__).parents[1] / "default_bundle", beside]
    with contextlib.suppress(ModuleNotFoundError):
        candidates.insert(0, Path(str(resources.files(_PACKAGE))))
    for candidate in candidates:
        if (candidate / MANIFEST).is_file():
            return candidate
    raise BundleError(
        "this installation has no bundled model; install the wheel, or pass a bundle folder"
    )
