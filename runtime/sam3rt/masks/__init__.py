"""From low-resolution logits to masks of the image's size."""

from __future__ import annotations

from .postprocess import MaskOptions, clean, clean_all, finish, upsample

__all__ = ["MaskOptions", "clean", "clean_all", "finish", "upsample"]
