"""sam3rt: SAM 3's interactive predictor as a torch-free deployment runtime."""

from __future__ import annotations

from ._version import __version__
from .bundle import Bundle, Manifest, open_bundle
from .embedding import ImageEmbedding
from .errors import (
    BackendError,
    BundleError,
    EmbeddingError,
    ImageError,
    InvalidInputError,
    PromptError,
    PromptWarning,
    Sam3rtError,
    StateError,
    VerificationError,
)
from .model import DecodedMasks, SegmentationModel, load_model
from .predictor import SAM3InteractiveImagePredictor
from .prompts import Prompts

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "DecodedMasks",
    "EmbeddingError",
    "ImageEmbedding",
    "ImageError",
    "InvalidInputError",
    "Manifest",
    "PromptError",
    "PromptWarning",
    "Prompts",
    "SAM3InteractiveImagePredictor",
    "Sam3rtError",
    "SegmentationModel",
    "StateError",
    "VerificationError",
    "__version__",
    "load_model",
    "open_bundle",
]
