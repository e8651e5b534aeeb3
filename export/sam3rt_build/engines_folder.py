"""A bundle's folder of engines and typed graphs, into which one build at a time may write."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from sam3rt.backends.table import ENGINES
from sam3rt.backends.tensorrt.driver import Gpu
from sam3rt.backends.tensorrt.sidecar import BackendName
from sam3rt.bundle import Bundle, is_inside
from sam3rt.bundle.files import remove_temporaries
from sam3rt.errors import BundleError

from .errors import BuildError

_LOCK = ".lock"


@contextlib.contextmanager
def exclusive(bundle: Bundle) -> Iterator[Path]:
    """The folder, for one build at a time. The lock ends with its process, however that ends.

    Raises:
        BundleError: the folder lies elsewhere, behind a link, where the runtime would not look.
        BuildError: another build is at work.
        OSError: it cannot be made or written to.
    """
    folder = bundle.path / ENGINES
    try:
        inside = is_inside(folder, bundle.path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
        raise BundleError(f"cannot be read: {error}", ENGINES) from error
    if not inside:
        raise BundleError("is a link that leaves the bundle", ENGINES)
    folder.mkdir(exist_ok=True)
    try:
        held = FileLock(folder / _LOCK).acquire(timeout=0)
    except Timeout as error:
        raise BuildError(f"another build is at work in {folder}") from error
    with held:
        _clear(folder)
        yield folder


def folder_name(
    gpu: Gpu | None,
    targets: Sequence[str],
    backend: BackendName,
    tensorrt_version: str,
    recipe: str,
) -> str:
    """The folder of engines built alike, such as ``nvidia-l4-sm89-tensorrt-10.3.0-fp16``.

    Args:
        gpu: the GPU they were built on; ``None`` for an ahead-of-time build, whose folder is
            named for its targets: ``any-sm86-sm89-tensorrt-rtx-1.7.1.116-fp16``.
        targets: compute capabilities of an ahead-of-time build.
        backend: the TensorRT flavour.
        tensorrt_version: its version.
        recipe: the precision recipe.
    """
    kind = "any" if gpu is None else re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    capabilities = targets if gpu is None else (gpu.compute_capability,)
    architectures = "-".join("sm" + capability.replace(".", "") for capability in capabilities)
    return f"{kind}-{architectures}-{backend}-{tensorrt_version}-{recipe}"


def _clear(folder: Path) -> None:
    """Remove what a build left that was killed; the folder of engines is locked."""
    for path in [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink()]:
        if path.name.startswith(".build-"):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # somebody else's; nothing reads them
                remove_temporaries(path)
