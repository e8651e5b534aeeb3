"""The ONNX Runtime backend: CPU, or CUDA where onnxruntime-gpu finds a device.

On the CPU, and on CUDA where cuda-python is missing, ``backend`` runs two sessions. On CUDA the
sessions run in the lanes that the TensorRT backend has too: see ``lanes``.
"""

from __future__ import annotations

from .backend import OnnxRuntimeBackend
from .lanes import OnnxRuntimeLanes
from .recipes import offer, providers

__all__ = ["OnnxRuntimeBackend", "OnnxRuntimeLanes", "offer", "providers"]
