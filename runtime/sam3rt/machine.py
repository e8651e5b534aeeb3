"""What this machine is, in words that tell two kinds of machine apart, and what is installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sys
from functools import lru_cache
from pathlib import Path
from typing import Literal

_CPUINFO = Path("/proc/cpuinfo")
# What results and speed may depend on.
_PACKAGES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-python",
    "torch",
    "transformers",
    "onnx",
    "polygraphy",
)


@lru_cache(maxsize=1)
def processor_name() -> str:
    """The processor's name; on Linux with the numbers that tell kinds apart.

    A virtual machine's processor may be called "AMD EPYC" and no more: then family, model and
    stepping do. An ARM processor has no name at all, but an implementer and a part.
    """
    fields = _cpuinfo()
    if not fields:
        return platform.processor() or platform.machine()
    name = fields.get("model name") or platform.machine()
    numbers = [
        f"{label} {fields[field]}"
        for label, field in (
            ("family", "cpu family"),
            ("model", "model"),
            ("stepping", "stepping"),
            ("implementer", "CPU implementer"),
            ("part", "CPU part"),
            ("variant", "CPU variant"),
        )
        if field in fields
    ]
    return ", ".join([name, " ".join(numbers)]) if numbers else name


def processor_has(flag: str) -> bool:
    """Whether Linux lists an extension of the instruction set, such as ``"amx_bf16"``.

    On ARM the names are others, such as ``"bf16"``. ``False`` on systems that do not say.
    """
    fields = _cpuinfo()
    return flag in fields.get("flags", fields.get("Features", "")).split()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    return {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in first.splitlines())
    }


def usable_cores() -> int:
    """Logical cores this process may run on, which a container may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user_folder(kind: Literal["data", "cache"]) -> Path:
    """Where programs keep a user's data, or what they can make again, by each system's custom.

    Raises:
        RuntimeError: there is no home folder.
    """
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    if sys.platform == "darwin":
        names = {"data": "Application Support", "cache": "Caches"}
        return Path.home() / "Library" / names[kind]
    named = os.environ.get(f"XDG_{kind.upper()}_HOME", "")
    below = {"data": ".local/share", "cache": ".cache"}
    return Path(named) if Path(named).is_absolute() else Path.home() / below[kind]


def memory_gb() -> float | None:
    """Memory of the machine, 10^9 bytes; ``None`` where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def package_versions() -> dict[str, str]:
    """Versions of the installed libraries that sam3rt may use."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
