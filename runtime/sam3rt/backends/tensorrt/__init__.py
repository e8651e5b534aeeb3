"""The TensorRT backend, for the modules ``tensorrt`` and ``tensorrt_rtx``.

Both offer the same runtime API under two names. Engines are built beforehand by ``sam3rt build``;
here they are found, checked and run. Importing this package imports neither TensorRT nor CUDA.

``offer`` is where loading begins, ``engines`` and ``sidecar`` say which engines fit,
``engine_backend`` loads a set of them, and ``backend`` runs it: through a ``lane`` of the ``pool``,
which drives ``trt`` and ``cuda``.
"""

from __future__ import annotations

from .backend import LaneBackend
from .engine_backend import Platform, TensorRtBackend, open_platform
from .offer import allow_imaging, offer_tensorrt, offer_tensorrt_rtx, open_engines

__all__ = [
    "LaneBackend",
    "Platform",
    "TensorRtBackend",
    "allow_imaging",
    "offer_tensorrt",
    "offer_tensorrt_rtx",
    "open_engines",
    "open_platform",
]
