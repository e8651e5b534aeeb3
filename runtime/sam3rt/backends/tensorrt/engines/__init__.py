"""Built engines beside a bundle: what each one is, and which of them fit this machine."""

from __future__ import annotations

from .selection import (
    RECIPE_ORDER,
    EngineFile,
    EngineSet,
    Machine,
    candidates,
    choose,
    engine_path,
    find_engines,
    folder_name,
)
from .sidecar import EngineShapes, EngineSidecar, Gpu, read_sidecar, sidecar_path, write_sidecar

__all__ = [
    "RECIPE_ORDER",
    "EngineFile",
    "EngineSet",
    "EngineShapes",
    "EngineSidecar",
    "Gpu",
    "Machine",
    "candidates",
    "choose",
    "engine_path",
    "find_engines",
    "folder_name",
    "read_sidecar",
    "sidecar_path",
    "write_sidecar",
]
