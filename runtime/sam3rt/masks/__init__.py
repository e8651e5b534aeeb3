"""From low-resolution logits to masks of the image's size, and masks as runs and polygons."""

from __future__ import annotations

from .postprocess import MaskOptions, clamp, clean, finish, upsample

__all__ = ["MaskOptions", "clamp", "clean", "finish", "upsample"]
