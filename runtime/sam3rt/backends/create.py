"""From a backend's name to a backend that is proven here."""

from __future__ import annotations

import importlib
import logging
import re
from typing import Any

from ..accuracy.select import select
from ..bundle import Bundle
from ..errors import BackendError, InvalidInputError, VerificationError
from .base import Backend, GpuOptions, Offer
from .table import BACKENDS, entry, nothing_installed

_LOG = logging.getLogger(__name__)

# What "auto" tries, best first, and the device each is tried on.
AUTO_ORDER: tuple[tuple[str, str], ...] = (
    ("tensorrt", "cuda"),
    ("tensorrt-rtx", "cuda"),
    ("onnxruntime", "cuda"),
    ("openvino", "cpu"),
    ("onnxruntime", "cpu"),
)
_DEVICE = re.compile(r"auto|cpu|cuda(?::\d{1,3})?")


def create_backend(
    name: str,
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
    map_weights: bool = False,
    gpu: GpuOptions | None = None,
) -> Backend:
    """Create the named backend, or the best one that works here for ``"auto"``.

    Args:
        name: a backend's name or ``"auto"``.
        bundle: an opened bundle.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
        threads: CPU threads per operator; ``None`` leaves it to the backend.
        precision: ``"auto"``, or what the backend must compute in; see the backends.
        map_weights: see :func:`sam3rt.load_model`.
        gpu: for backends on a GPU; others pay no heed to it.

    Raises:
        InvalidInputError: there is no backend of that name, or an option makes no sense.
        BackendError: it cannot be used here; the message says what to install or change.
        VerificationError: the precision asked for fails the gate here.
        BundleError: the bundle's parity record is damaged.
    """
    if name not in ("auto", *BACKENDS):
        raise InvalidInputError("backend", repr(name), "one of " + ", ".join(["auto", *BACKENDS]))
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise InvalidInputError("device", repr(device), '"auto", "cpu", "cuda" or "cuda:N"')
    if threads is not None and (
        isinstance(threads, bool) or not isinstance(threads, int) or threads < 1
    ):
        raise InvalidInputError("threads", repr(threads), "a positive whole number or None")
    if not isinstance(precision, str):
        raise InvalidInputError("precision", repr(precision), 'a name such as "auto" or "fp32"')
    options: dict[str, Any] = {
        "threads": threads,
        "precision": precision,
        "map_weights": map_weights,
        "gpu": gpu,
    }
    if name != "auto":
        return _create(name, bundle, device=device, **options)
    nothing = nothing_installed()
    if nothing is not None:
        raise BackendError(nothing)
    reasons = []
    for candidate, kind in AUTO_ORDER:
        if device != "auto" and device.partition(":")[0] != kind:
            continue
        try:
            backend = _create(
                candidate, bundle, device=kind if device == "auto" else device, **options
            )
        except (BackendError, VerificationError) as error:
            reasons.append(f"{candidate} on {kind}: {error}")
            continue
        skipped = "".join(f"; not {reason}" for reason in reasons)
        _LOG.info("chose %s on %s%s", candidate, backend.device, skipped)
        return backend
    raise BackendError("no backend works here: " + "; ".join(reasons))


def _create(name: str, bundle: Bundle, **options: Any) -> Backend:
    """Open the first recipe of a backend that is proven here.

    Raises:
        BackendError: also where the backend's module cannot be imported: its library is missing or
            broken, or a frozen application left it out.
    """
    found = entry(name)
    module, _, function = found.factory.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except Exception as error:  # a broken installation of somebody else's library
        raise BackendError(
            f"the {name} backend cannot be imported ({error}): {found.hint}"
        ) from error
    if not found.takes_gpu_options:
        del options["gpu"]
    offer: Offer = factory(bundle, **options)

    def say(line: str) -> None:
        _LOG.info("%s: %s", name, line)

    try:
        return select(bundle, offer.recipes, offer.open, say=say, on_verdict=offer.on_verdict)
    except BackendError as error:
        if not offer.advice:
            raise
        raise BackendError(f"{error}. {offer.advice}") from error
