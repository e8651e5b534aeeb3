"""What is known of every backend without importing it: one table for code, messages and `info`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import NamedTuple

from .telemetry import unreported_openvino

# The folder in a bundle where what was built from it lies.
ENGINES = "engines"


class BackendEntry(NamedTuple):
    """One backend.

    Attributes:
        name: what callers ask for.
        factory: "module:function" of what offers it; see :class:`sam3rt.backends.base.Offer`.
        modules: the Python modules that it cannot do without.
        extra: the extra of sam3rt that installs its modules.
        note: what to do where the extra is not the way, or empty.
    """

    name: str
    factory: str
    modules: tuple[str, ...]
    extra: str
    note: str = ""

    @property
    def hint(self) -> str:
        """How to install it."""
        return f"pip install 'sam3rt[{self.extra}]'" + (f", {self.note}" if self.note else "")

    def missing(self) -> tuple[str, ...]:
        """The modules that are not installed. Imports none of them."""
        return tuple(module for module in self.modules if not _is_installed(module))

    def problem(self) -> str | None:
        """Why its modules cannot be imported here, and what to install, or ``None``.

        Imports them, and loads nothing onto a device.
        """
        for module in self.modules:
            try:
                with unreported_openvino():
                    importlib.import_module(module)
            except Exception as error:  # somebody else's broken installation raises anything
                return f"{module} cannot be imported ({error or type(error).__name__}): {self.hint}"
        return None


TABLE: tuple[BackendEntry, ...] = (
    BackendEntry(
        "tensorrt",
        "sam3rt.backends.tensorrt.offer:offer_tensorrt",
        ("tensorrt", "cuda.bindings"),
        "gpu",
        "or on a Jetson JetPack's own python3-libnvinfer and pip install 'cuda-python==12.9.*'",
    ),
    BackendEntry(
        "tensorrt-rtx",
        "sam3rt.backends.tensorrt.offer:offer_tensorrt_rtx",
        ("tensorrt_rtx", "cuda.bindings"),
        "rtx",
    ),
    BackendEntry(
        "onnxruntime",
        "sam3rt.backends.onnxruntime.recipes:offer",
        ("onnxruntime",),
        "cpu",
        "or 'sam3rt[gpu]' instead of it for CUDA",
    ),
    BackendEntry("openvino", "sam3rt.backends.openvino:offer", ("openvino",), "openvino"),
)

BACKENDS = tuple(entry.name for entry in TABLE)


def entry(name: str) -> BackendEntry:
    """The entry of that name.

    Raises:
        KeyError: there is none.
    """
    for found in TABLE:
        if found.name == name:
            return found
    raise KeyError(name)


def nothing_installed() -> str | None:
    """What to install where no backend's modules are, or ``None`` where one's are."""
    if any(not found.missing() for found in TABLE):
        return None
    return f"no backend is installed: {entry('onnxruntime').hint}"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a missing or broken parent package
        return False
