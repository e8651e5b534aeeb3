"""Let a torchvision built for CUDA be imported beside a CPU-only PyTorch.

PyPI's torchvision is built for CUDA. Beside a CPU-only PyTorch its compiled operators cannot be
loaded, and its import then stumbles over their names. transformers and timm import torchvision
wherever it is installed, so this is in the way of an export on a machine without a GPU.
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
