"""The TensorRT backend, for the modules ``tensorrt`` and ``tensorrt_rtx``.

Both offer the same runtime API under two names. Engines are built beforehand by ``sam3rt build``;
here they are chosen, checked, proved where they have not been, and run. Importing this package
imports neither TensorRT nor CUDA.
"""

from __future__ import annotations

from .backend import TensorRtBackend
from .loading import offer_tensorrt, offer_tensorrt_rtx, open_set, open_tensorrt, open_tensorrt_rtx
from .platform import Platform, open_platform
from .proof import prove

__all__ = [
    "Platform",
    "TensorRtBackend",
    "offer_tensorrt",
    "offer_tensorrt_rtx",
    "open_platform",
    "open_set",
    "open_tensorrt",
    "open_tensorrt_rtx",
    "prove",
]
