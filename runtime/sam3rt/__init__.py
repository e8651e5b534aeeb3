"""sam3rt: SAM 3's interactive predictor as a torch-free deployment runtime."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BackendError,
    BundleError,
    DeviceLostError,
    EmbeddingError,
    ImageError,
    InvalidInputError,
    PromptError,
    PromptWarning,
    Sam3rtError,
    StateError,
    StateWarning,
    VerificationError,
)

if TYPE_CHECKING:
    from .automatic import AutomaticMaskGenerator
    from .backends.options import GpuOptions
    from .bundle import Bundle, Manifest, open_bundle
    from .embedding import ImageEmbedding
    from .loading import load_model
    from .model import DecodedMasks, SegmentationModel
    from .overlay import draw_overlay
    from .predictor import SAM3InteractiveImagePredictor
    from .prompts import Prompts
    from .results import Segmentation

# Where each other name lives. Those are imported when they are first used, so that the command line
# runs before NumPy has loaded and can be interrupted meanwhile.
_HOMES = {
    "automatic": ("AutomaticMaskGenerator",),
    "backends.options": ("GpuOptions",),
    "bundle": ("Bundle", "Manifest", "open_bundle"),
    "embedding": ("ImageEmbedding",),
    "loading": ("load_model",),
    "model": ("DecodedMasks", "SegmentationModel"),
    "overlay": ("draw_overlay",),
    "predictor": ("SAM3InteractiveImagePredictor",),
    "prompts": ("Prompts",),
    "results": ("Segmentation",),
}

__all__ = [
    "AutomaticMaskGenerator",
    "BackendError",
    "Bundle",
    "BundleError",
    "DecodedMasks",
    "DeviceLostError",
    "EmbeddingError",
    "GpuOptions",
    "ImageEmbedding",
    "ImageError",
    "InvalidInputError",
    "Manifest",
    "PromptError",
    "PromptWarning",
    "Prompts",
    "SAM3InteractiveImagePredictor",
    "Sam3rtError",
    "Segmentation",
    "SegmentationModel",
    "StateError",
    "StateWarning",
    "VerificationError",
    "__version__",
    "draw_overlay",
    "load_model",
    "open_bundle",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    if not name.startswith("_"):
        try:
            return importlib.import_module(f".{name}", __name__)
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
