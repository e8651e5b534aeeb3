"""Proving engines on the machine that will serve them, once, and keeping the verdict beside them.

Encoder and decoder are proved together on the bundle's parity record, by the gate. What stands
around them computes what the host computes too, so it is compared with the host.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...accuracy.gate import GATE_LIMITS, Verdict, judge
from ...accuracy.metrics import Measurement
from ...accuracy.record import load_record, verify
from ...bundle import Bundle
from ...errors import BackendError
from ...geometry import ImageGeometry, geometry, preprocess
from ...masks import upsample
from .backend import TensorRtBackend
from .engines.selection import EngineFile, EngineSet, Machine, proven_on
from .engines.sidecar import State, write_sidecar

_LOG = logging.getLogger(__name__)

# Of values up to about 2.6; matrix products of FP32 sums reach 1e-6.
_PIXEL_ERROR = 1e-3
# Pixels whose logit is within rounding of the threshold.
_MASK_PIXELS = 1e-4


@dataclass(frozen=True)
class Refusal:
    """How a set of engines failed the gate.

    Attributes:
        engines: the set.
        explanation: what failed by how much.
        figures: the gate's worst figures.
        encoder_at_fault: whether the feature maps were wrong already. Where they were not, either
            engine may be to blame: limits are wide, and features just within them may be too far
            off for a decoder that is right.
    """

    engines: EngineSet
    explanation: str
    figures: dict[str, float]
    encoder_at_fault: bool


class RefusedError(BackendError):
    """A set of engines failed the gate.

    Attributes:
        refusal: how.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.explanation)
        self.refusal = refusal


# For folders that cannot be written: how a set failed, or nothing, by engine hashes and GPU.
_remembered: dict[tuple[str, str, str], Refusal | None] = {}


def prove(bundle: Bundle, backend: TensorRtBackend) -> Verdict:
    """Run encoder and decoder on the bundle's parity record.

    Raises:
        BundleError: the record is damaged.
        BackendError: the GPU failed.
    """
    return judge(verify(backend, bundle.manifest, load_record(bundle), GATE_LIMITS))


def prove_preprocess(bundle: Bundle, backend: TensorRtBackend) -> Verdict:
    """Compare the device's preprocessing of the record's images with the host's."""
    spec = bundle.manifest.image

    def compare() -> Iterator[Measurement]:
        for index, image in enumerate(load_record(bundle).images()):
            place = geometry(spec, (image.shape[0], image.shape[1]))
            if not backend.imaging.preprocess_fits(place):
                continue
            expected, _ = preprocess(spec, image)
            error = float(np.abs(backend.pixels(image) - expected).max())
            yield Measurement(f"image {index}", "pixels", "error", error, _PIXEL_ERROR)

    return judge(compare())


def prove_postprocess(bundle: Bundle, backend: TensorRtBackend) -> Verdict:
    """Compare the device's upsampling with the host's, for the record's images."""
    manifest = bundle.manifest
    height, width = manifest.masks.low_res_size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = [
        np.sin(x / (5 + 7 * k)) * np.cos(y / (9 + 4 * k)) * 20 + k
        for k in range(manifest.masks.multimask)
    ]
    logits = np.stack(waves).astype(np.float32)[None]

    def compare() -> Iterator[Measurement]:
        for index, image in enumerate(load_record(bundle).images()):
            place = geometry(manifest.image, (image.shape[0], image.shape[1]))
            if not backend.imaging.postprocess_fits(place):
                continue
            for threshold in (0.0, 1.5):
                expected = _host_masks(bundle, logits, place, threshold)
                differing = float((backend.upsample(logits, place, threshold) != expected).mean())
                yield Measurement(
                    f"image {index} above {threshold}",
                    "masks",
                    "differing",
                    differing,
                    _MASK_PIXELS,
                )

    return judge(compare())


def prove_set(bundle: Bundle, backend: TensorRtBackend, machine: Machine) -> None:
    """Prove a set that has not been, and keep the verdict.

    Raises:
        RefusedError: it fails the gate, or failed it before.
        BackendError: the GPU failed.
    """
    encoder, decoder = backend.engines.encoder, backend.engines.decoder
    key = _key(backend.engines, machine)
    if key not in _remembered:
        verdict = prove(bundle, backend)
        figures = _figures(verdict)
        if verdict.passed:
            digest = encoder.sidecar.engine.sha256
            _keep(encoder, machine, state="proven", parity=figures)
            _keep(decoder, machine, state="proven", parity=figures, paired_with=digest)
            _remembered[key] = None
        else:
            features = any(m.output.startswith("features") for m in verdict.failures)
            if features:
                _keep(encoder, machine, state="refused", parity=figures)
            _remembered[key] = Refusal(
                backend.engines,
                f"{_where(encoder)} with {_where(decoder)} fails the gate on this GPU: "
                f"{verdict.explain()}",
                figures,
                features,
            )
    refusal = _remembered[key]
    if refusal is not None:
        raise RefusedError(refusal)


def settle(refusals: Sequence[Refusal], engines: EngineSet, machine: Machine) -> None:
    """Find out, from the set that passed, which engines of those that failed are to blame.

    The engine that a failed set shares with the good one is right, so the other one is not.
    """
    for refusal in refusals:
        failed = refusal.engines
        at_fault = None
        if failed.encoder.path == engines.encoder.path:
            at_fault = failed.decoder
        elif failed.decoder.path == engines.decoder.path:
            at_fault = failed.encoder
        if at_fault is not None and not refusal.encoder_at_fault:
            _keep(at_fault, machine, state="refused", parity=refusal.figures)


def allow_imaging(bundle: Bundle, backend: TensorRtBackend, machine: Machine) -> None:
    """Let the device do what surrounds the network, as far as it does it rightly.

    What fails, or cannot run, is left to the host, which is slower and never wrong.
    """
    imaging = backend.imaging
    engines = backend.engines
    for engine, compare, attribute in (
        (engines.preprocess, prove_preprocess, "preprocess_allowed"),
        (engines.postprocess, prove_postprocess, "postprocess_allowed"),
    ):
        if engine is None:
            continue
        if not proven_on(engine.sidecar, machine):
            try:
                verdict = compare(bundle, backend)
            except BackendError as error:
                _LOG.warning("%s is not used: %s", engine.path, str(error))
                continue
            if not verdict.measurements:
                _LOG.info("%s is not used: it takes none of the record's images", engine.path)
                continue
            state: State = "proven" if verdict.passed else "refused"
            _keep(engine, machine, state=state, parity=_figures(verdict))
            if not verdict.passed:
                _LOG.warning("%s is not used: %s", engine.path, verdict.explain())
                continue
        setattr(imaging, attribute, True)


def _host_masks(
    bundle: Bundle, logits: NDArray[np.float32], place: ImageGeometry, threshold: float
) -> NDArray[np.uint8]:
    manifest = bundle.manifest
    masks = np.empty((*logits.shape[:2], *place.original_size), np.uint8)
    for index in np.ndindex(*logits.shape[:2]):
        upsample(logits[index], place, manifest.image, manifest.masks, masks[index], threshold)
    return masks


def _where(engine: EngineFile) -> str:
    return f"{engine.path.parent.name}/{engine.path.name}"


def _figures(verdict: Verdict) -> dict[str, float]:
    return {name: float(m.value) for name, m in verdict.worst().items()}


def _key(engines: EngineSet, machine: Machine) -> tuple[str, str, str]:
    return (
        engines.encoder.sidecar.engine.sha256,
        engines.decoder.sidecar.engine.sha256,
        f"{machine.gpu} {machine.tensorrt_version}",
    )


def _keep(engine: EngineFile, machine: Machine, **changes: Any) -> None:
    """Write a verdict into an engine's sidecar."""
    sidecar = msgspec.structs.replace(
        engine.sidecar, gpu=machine.gpu, driver_version=machine.driver_version, **changes
    )
    try:
        write_sidecar(engine.path, sidecar)
    except OSError as error:
        _LOG.info(
            "%s is %s, but that cannot be written (%s): the next process proves it again",
            engine.path,
            sidecar.state,
            error,
        )
