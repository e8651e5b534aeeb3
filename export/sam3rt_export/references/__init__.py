"""The models to export, in PyTorch code that is not ours.

That code imports torchvision wherever it is installed. PyPI's torchvision is built for CUDA. Beside
a CPU-only PyTorch its compiled operators cannot be loaded, and its import then fails for want of
their names. This package declares the names, so that an export works on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from torch import ops
from torch.library import Library

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# A library's declarations last as long as the object does.
_declared: list[Library] = []


@functools.cache
def declare_missing_operators() -> None:
    """Declare the names torchvision's import asks for, where its operators do not load.

    Nothing here calls them. Does nothing where torchvision works or is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or _operators_load(Path(spec.origin).parent):
        return
    library = Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SIGNATURE)
    _declared.append(library)


def _operators_load(folder: Path) -> bool:
    try:
        for extension in folder.glob("_C*.so"):
            ops.load_library(str(extension))
    except (OSError, RuntimeError):
        return False
    return True


declare_missing_operators()
