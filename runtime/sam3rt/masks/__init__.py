"""From low-resolution logits to masks of the image's size."""

from __future__ import annotations

from .postprocess import clean, clean_all, finish, upsample

__all__ = ["clean", "clean_all", "finish", "upsample"]
