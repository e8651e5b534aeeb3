"""Backends, by name. Importing this package imports none of them."""

from __future__ import annotations

import importlib
from typing import Any

from ..bundle import Bundle
from ..errors import BackendError, InvalidInputError
from .base import Backend, Features

__all__ = ["BACKENDS", "Backend", "Features", "create_backend"]

# Dotted paths, so that a backend's libraries are imported only when it is asked for.
BACKENDS: dict[str, str] = {
    "onnxruntime": "sam3rt.backends.onnxruntime:OnnxRuntimeBackend",
}
# What "auto" tries, best first.
AUTO_ORDER = ("onnxruntime",)


def create_backend(name: str, bundle: Bundle, **options: Any) -> Backend:
    """Create the named backend, or the best one that works here for ``"auto"``.

    Raises:
        InvalidInputError: there is no backend of that name.
        BackendError: it cannot be used here; the message says what to install or change.
    """
    if name == "auto":
        failures = []
        for candidate in AUTO_ORDER:
            try:
                return create_backend(candidate, bundle, **options)
            except BackendError as error:
                failures.append(f"{candidate}: {error}")
        raise BackendError("no backend works here: " + "; ".join(failures))
    if name not in BACKENDS:
        raise InvalidInputError(
            "backend", repr(name), "one of " + ", ".join(["auto", *sorted(BACKENDS)])
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(bundle, **options)
    return backend
