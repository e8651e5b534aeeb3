"""Bundles by name: where they are looked for, in order.

1. ``engines`` of the working folder,
2. the folder ``SAM3RT_HOME`` names,
3. ``sam3rt`` in the user's data folder (``~/.local/share`` on Linux, or ``XDG_DATA_HOME``),
4. the bundled MobileSAM, as ``mobile_sam``.

A name is that of the bundle's folder.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from pathlib import Path

from ..errors import BundleError
from ..machine import user_folder
from .default import default_bundle_path
from .files import MANIFEST

DEFAULT_NAME = "mobile_sam"


def search_folders() -> list[Path]:
    """The folders that may hold bundles, whether they exist or not; the first wins."""
    folders = [Path("engines")]
    if os.environ.get("SAM3RT_HOME"):
        folders.append(Path(os.environ["SAM3RT_HOME"]))
    with contextlib.suppress(RuntimeError):  # a user without a home
        folders.append(user_folder("data") / "sam3rt")
    return folders


def list_bundles() -> dict[str, Path]:
    """All bundles that have a name, with their folders. What hides behind another is left out."""
    bundles: dict[str, Path] = {}
    for folder in search_folders():
        try:
            found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        except OSError:
            continue
        for path in found:
            bundles.setdefault(path.name, path)
    with contextlib.suppress(BundleError):
        bundles.setdefault(DEFAULT_NAME, default_bundle_path())
    return bundles


def find_bundle(bundle: str | os.PathLike[str]) -> Path:
    """The folder of a bundle, given its path or its name. A path that exists wins over a name.

    Raises:
        BundleError: it is neither; the message says where it was looked for.
    """
    path = Path(bundle)
    if path.exists() or path.is_symlink():
        return path
    if len(path.parts) != 1 or path.is_absolute() or path.name in ("", ".."):
        raise BundleError(f"no bundle folder at {path}")
    bundles = list_bundles()
    if path.name in bundles:
        return bundles[path.name]
    near = difflib.get_close_matches(path.name, bundles, 1)
    raise BundleError(
        f"no bundle folder at {path}, and no bundle of that name in "
        f"{', '.join(map(str, search_folders()))}; by name there "
        f"{'are' if len(bundles) > 1 else 'is'} {', '.join(bundles) or 'none'}"
        + (f": did you mean {near[0]}?" if near else "")
    )
