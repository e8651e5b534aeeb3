"""Give memory back between the stages of an export."""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Collect garbage, and have the C library return free memory to the system.

    glibc keeps freed blocks of up to 32 MB for itself, and the weights of a ViT are that large:
    gigabytes of them would stand beside the next stage's.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
