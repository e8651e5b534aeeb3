"""Give memory back between the stages of an export."""

from __future__ import annotations

import ctypes
import gc
import sys


def free_memory() -> None:
    """Collect garbage, and let the C library return free memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself. The weights of a ViT have that size, so
    gigabytes would stay allocated during the next stage.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
