"""Does a loaded model still give the right answer? A readiness probe for services."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

from ..errors import Sam3rtError
from ..model import SegmentationModel
from .gate import GATE_LIMITS, judge
from .record import load_record, run_case


@dataclass(frozen=True)
class Health:
    """What a model answered to a known question.

    Attributes:
        healthy: whether every output was within its limits.
        problem: what was not, or empty.
        backend: what runs the graphs.
        device: where.
        precision: what they compute in.
        fingerprint: of the bundle.
        encode_seconds: time of one encoder run, or 0 where it failed.
        decode_seconds: time of one decoder run, or 0 where it failed.
    """

    healthy: bool
    problem: str
    backend: str
    device: str
    precision: str
    fingerprint: str
    encode_seconds: float
    decode_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for a JSON response."""
        return dataclasses.asdict(self)


def check_health(model: SegmentationModel) -> Health:
    """Put the first case of the bundle's parity record to a model and judge its answer.

    One small image and one prompt: about as much as one request. A backend that computes in FP32
    is held to the bundle's own limits, any other to the gate's. Nothing is raised for a model that
    is not well; that is the answer.
    """
    exact = model.backend.precision == "fp32"
    limits = model.manifest.parity.limits if exact else GATE_LIMITS
    encode_seconds = decode_seconds = 0.0
    try:
        record = load_record(model.bundle)
        case = record.cases()[0]
        start = time.perf_counter()
        embedding = model.encode(record.images()[case.image])
        maps = embedding.features.numpy()
        encoded = time.perf_counter()
        answer = run_case(model, embedding, case)
        # The record's cases hold a multi-mask and a single-mask run.
        decode_seconds = (time.perf_counter() - encoded) / 2
        encode_seconds = encoded - start
        verdict = judge(record.compare_features(case.image, maps, limits))
        if verdict.passed:
            verdict = judge(record.compare_case(case, answer, limits))
        problem = "" if verdict.passed else verdict.explain()
    except (Sam3rtError, OSError, MemoryError) as error:
        problem = f"{type(error).__name__}: {error}"
    return Health(
        not problem,
        problem,
        model.backend.name,
        model.device,
        model.backend.precision,
        model.manifest.fingerprint,
        encode_seconds,
        decode_seconds,
    )
