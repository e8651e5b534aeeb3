"""CUDA, as little of it as the TensorRT backend needs. Importing this imports no CUDA library."""

from __future__ import annotations

from .api import Cuda, CudaRuntime, HostArray
from .driver import Device, probe

__all__ = ["Cuda", "CudaRuntime", "Device", "HostArray", "probe"]
