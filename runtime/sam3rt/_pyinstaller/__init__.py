"""Tells PyInstaller what an application that uses sam3rt must contain."""

from __future__ import annotations

from pathlib import Path


def hook_dirs() -> list[str]:
    """Folders with hooks, as PyInstaller asks for them by the entry point ``pyinstaller40``."""
    return [str(Path(__file__).parent)]
