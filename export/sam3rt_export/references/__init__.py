"""The models to export, in PyTorch code that is not ours.

That code imports torchvision wherever it is installed. PyPI's torchvision is built for CUDA. Beside
a CPU-only PyTorch its compiled operators cannot be loaded, and its import then fails for want of
their names. This package declares the names, so that an export works on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn, ops
from torch.library import Library

from ..checkpoint_keys import unknown_tensors
from ..errors import ModelError

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


def load_parameters(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    optional: tuple[str, ...] = (),
) -> None:
    """Give a model its parameters, without copying them, and put it in evaluation mode.

    Args:
        model: another author's.
        parameters: by its names.
        tensors: the same by the checkpoint's names, for messages.
        optional: what the names of those that may be missing start with.

    Raises:
        ModelError: a parameter is missing, has the wrong shape or is one too many.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    for name, own in model.state_dict().items():
        given = parameters.get(name, own)
        if given.shape != own.shape:
            raise ModelError(
                f"tensor {names.get(id(given), name)!r} is {tuple(given.shape)}, expected "
                f"{tuple(own.shape)}"
            )
    report = model.load_state_dict(dict(parameters), strict=False, assign=True)
    missing = [name for name in report.missing_keys if not name.startswith(optional)]
    if missing:
        raise ModelError(f"{len(missing)} parameters are missing: {', '.join(missing[:3])}")
    if report.unexpected_keys:
        raise unknown_tensors(report.unexpected_keys)
    model.eval()
