"""Where the bundled model lies."""

from __future__ import annotations

from pathlib import Path

from ..errors import BundleError
from .files import MANIFEST


def default_bundle_path() -> Path:
    """The folder of the bundled MobileSAM.

    Raises:
        BundleError: this installation has none, or its data are not files.
    """
    here = Path(__file__)
    # The wheel puts engines/mobile_sam of the repository into the package.
    package, checkout = here.parents[1], here.resolve().parents[3]
    for candidate in (package / "default_bundle", checkout / "engines" / "mobile_sam"):
        if (candidate / MANIFEST).is_file():
            return candidate
    if not package.is_dir():
        raise BundleError(
            f"this installation is packed into an archive ({package}), where the bundled model is "
            "not a file that can be opened; unpack it, or pass a bundle folder"
        )
    raise BundleError(
        "this installation has no bundled model; install the wheel, or pass a bundle folder"
    )
