"""From a backend's name to a backend that is proven here."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from functools import partial

from ..accuracy.select import select
from ..bundle import Bundle
from ..errors import BackendError, DeviceLostError, InvalidInputError, VerificationError
from .base import Backend, Offer, UnfitError
from .options import BackendOptions
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


def create_backend(name: str, bundle: Bundle, options: BackendOptions) -> Backend:
    """Create the named backend, or the best one that works here for ``"auto"``.

    Args:
        name: a backend's name or ``"auto"``.
        bundle: an opened bundle.
        options: where and how it runs.

    Raises:
        InvalidInputError: there is no backend of that name, or it has no such device.
        BackendError: it cannot be used here; the message says what to install or change.
        VerificationError: the precision asked for fails the gate here.
        BundleError: the bundle's parity record is damaged.
    """
    if name not in ("auto", *BACKENDS):
        raise InvalidInputError("backend", repr(name), "one of " + ", ".join(["auto", *BACKENDS]))
    if name != "auto":
        return _create(name, bundle, options)
    nothing = nothing_installed()
    if nothing is not None:
        raise BackendError(nothing)
    reasons = []
    for candidate, kind in AUTO_ORDER:
        device = kind if options.device == "auto" else options.device
        if device.partition(":")[0] != kind:
            continue
        try:
            backend = _create(candidate, bundle, replace(options, device=device))
        except (BackendError, VerificationError) as error:
            reasons.append(f"{candidate} on {kind}: {error}")
            # Whoever has built engines and is served by something slower should know.
            if isinstance(error, UnfitError | VerificationError):
                _LOG.warning("not %s", reasons[-1])
            continue
        skipped = "".join(f"; not {reason}" for reason in reasons)
        _LOG.info("chose %s on %s%s", candidate, backend.device, skipped)
        return backend
    raise BackendError("no backend works here: " + "; ".join(reasons))


def _create(name: str, bundle: Bundle, options: BackendOptions) -> Backend:
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
    offer: Offer = factory(bundle, options)

    say, warn = (partial(log, "%s: %s", name) for log in (_LOG.info, _LOG.warning))
    try:
        return select(bundle, offer.recipes, offer.open, say=say, warn=warn)
    except DeviceLostError:
        raise
    except BackendError as error:
        advice = f". {offer.advice}" if offer.advice else ""
        raise UnfitError(f"{error}{advice}") from error
