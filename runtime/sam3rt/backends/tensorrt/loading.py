"""Which engines serve: chosen, loaded, proved where they have not been, and refused by rule.

An engine is a program. Hashes catch damage and mix-ups, not malice: load only engines from a folder
that nobody else can write to.
"""

from __future__ import annotations

import logging
from typing import Any

from ...accuracy.select import Recipe
from ...bundle import Bundle
from ...errors import BackendError, BundleError, InvalidInputError
from ..base import Offer
from .backend import TensorRtBackend
from .cuda import probe
from .engines.selection import EngineSet, candidates, find_engines
from .engines.sidecar import BackendName
from .platform import Platform, open_platform
from .proof import Refusal, RefusedError, allow_imaging, prove_set, settle

_LOG = logging.getLogger(__name__)


def open_tensorrt(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> TensorRtBackend:
    """The backend over the module ``tensorrt``.

    Args:
        bundle: an opened bundle with engines.
        device: ``"auto"`` and ``"cuda"`` take the first GPU; ``"cuda:N"`` insists.
        threads: means nothing to a GPU.
        precision: ``"auto"`` for the fastest set that passes, a recipe for both engines, or
            ``"ENCODER+DECODER"``.

    Raises:
        InvalidInputError: the device is not a GPU.
        BackendError: the driver, a library or a fitting engine is missing, or no engine passed
            the gate; the message says what to do.
    """
    return open_backend("tensorrt", bundle, device, precision)


def open_tensorrt_rtx(
    bundle: Bundle,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> TensorRtBackend:
    """The backend over the module ``tensorrt_rtx``; see :func:`open_tensorrt`."""
    return open_backend("tensorrt-rtx", bundle, device, precision)


def offer_tensorrt(bundle: Bundle, *, map_weights: bool = False, **options: Any) -> Offer:
    """The backend over the module ``tensorrt``, opened and proved already."""
    return _offer(open_tensorrt(bundle, **options))


def offer_tensorrt_rtx(bundle: Bundle, *, map_weights: bool = False, **options: Any) -> Offer:
    """The backend over the module ``tensorrt_rtx``, opened and proved already."""
    return _offer(open_tensorrt_rtx(bundle, **options))


def _offer(backend: Any) -> Offer:
    return Offer((Recipe(backend.precision, backend.precision),), lambda recipe: backend)


def open_backend(
    flavour: BackendName, bundle: Bundle, device: str, precision: str
) -> TensorRtBackend:
    """The first set of engines that fits this machine and has passed the gate on it.

    Raises:
        InvalidInputError, BackendError: see :func:`open_tensorrt`.
    """
    if device == "cpu":
        raise InvalidInputError("device", "'cpu'", f'"auto", "cuda" or "cuda:N" with {flavour}')
    gpu = probe(int(device.partition(":")[2] or 0))
    found = [engine for engine in find_engines(bundle) if engine.sidecar.backend == flavour]
    if not found:
        raise BackendError(
            f"{bundle.path} has no {flavour} engines; build them on this machine: "
            f"sam3rt build {bundle.path} --backend {flavour}"
        )
    platform = open_platform(flavour, gpu)
    reasons: list[str] = []
    refusals: list[Refusal] = []
    for engines in candidates(bundle, platform.machine, precision, found):
        if any(r.encoder_at_fault and r.engines.encoder == engines.encoder for r in refusals):
            continue
        try:
            backend = open_set(bundle, engines, platform)
        except RefusedError as error:
            reasons.append(f"not {engines.precision}: {error}")
            refusals.append(error.refusal)
        except (BackendError, BundleError) as error:
            reasons.append(f"not {engines.precision}: {error}")
        else:
            settle(refusals, engines, platform.machine)
            _LOG.info("%s: chose %s", flavour, "; ".join([engines.precision, *reasons]))
            return backend
    raise BackendError(
        f"no {flavour} engine of {bundle.path} can serve: {'; '.join(reasons)}. Build others: "
        f"sam3rt build {bundle.path} --backend {flavour}"
    )


def open_set(bundle: Bundle, engines: EngineSet, platform: Platform) -> TensorRtBackend:
    """Load one set and, unless it has been proved on this kind of GPU, prove it.

    Raises:
        RefusedError: it fails the gate; its sidecar says so from now on.
        BundleError, BackendError: it cannot be loaded or run.
    """
    backend = TensorRtBackend(bundle, engines, platform)
    if not engines.proven:
        _LOG.info("proving %s on this GPU, once", engines.precision)
        prove_set(bundle, backend, platform.machine)
    allow_imaging(bundle, backend, platform.machine)
    return backend
