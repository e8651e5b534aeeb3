"""The gate: what a faster or narrower way of running a bundle must reach before it may serve.

FP16 and BF16 engines of this network have come out silently wrong elsewhere, with feature cosines
between 0.04 and 0.9 and a build log that says all is well. So nothing that computes in less than
FP32 is used before it has run on the bundle's parity record and met these limits on the machine
that will serve it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..bundle import LOOSEST_LIMITS, Bundle, Manifest, ParityLimits
from .metrics import Measurement
from .record import load_record
from .run import Runner, encode, run_case

# Cosine and mask IoU are the promise. The others catch what those two cannot see: an outlier
# channel, a scale, an IoU head that answers something else. They sit a few times above what BF16,
# the coarsest type that is let through, was measured to do.
GATE_LIMITS = LOOSEST_LIMITS


def limits_for(manifest: Manifest, precision: str) -> ParityLimits:
    """What a backend is held to: the bundle's own limits in FP32, the gate's in anything less."""
    return manifest.parity.limits if precision == "fp32" else GATE_LIMITS


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        measurements: every comparison that was made.
    """

    measurements: tuple[Measurement, ...]

    @property
    def failures(self) -> tuple[Measurement, ...]:
        """The comparisons outside their limits."""
        return tuple(m for m in self.measurements if not m.passed)

    @property
    def passed(self) -> bool:
        """Whether something was compared and all of it is within its limits."""
        return bool(self.measurements) and not self.failures

    def worst(self) -> dict[str, Measurement]:
        """The worst measurement of each output and metric, by their names in words."""
        worst: dict[str, Measurement] = {}
        for m in self.measurements:
            name = f"{m.output} {m.metric}"
            if name not in worst or m.badness > worst[name].badness:
                worst[name] = m
        return worst

    def explain(self) -> str:
        """How the worst failures fail, or that nothing does."""
        if not self.measurements:
            return "nothing was compared"
        failed = [m for m in self.worst().values() if not m.passed]
        if not failed:
            return "all outputs are within the gate's limits"
        return "; ".join(
            f"{m.subject}: {m.metric} {m.value:.4g}, "
            f"{'at least' if m.at_least else 'at most'} {m.limit:g} allowed"
            for m in failed
        )


def judge(measurements: Iterable[Measurement]) -> Verdict:
    """The verdict on measurements, such as :func:`sam3rt.accuracy.run.verify` yields."""
    return Verdict(tuple(measurements))


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


def check_health(runner: Runner, bundle: Bundle, name: str, device: str, precision: str) -> Health:
    """Put the first case of the bundle's parity record to a backend and judge its answer.

    One small image and one prompt: about as much as one request. Nothing is raised for a model
    that is not well; that is the answer.

    Args:
        runner: the backend.
        bundle: what it runs.
        name: see :attr:`Health.backend`.
        device: where it computes.
        precision: what it computes in.
    """
    manifest = bundle.manifest
    limits = limits_for(manifest, precision)
    encode_seconds = decode_seconds = 0.0
    try:
        record = load_record(bundle)
        case = record.cases()[0]
        start = time.perf_counter()
        features = encode(runner, manifest, record.images()[case.image])
        maps = features.numpy()
        encoded = time.perf_counter()
        answer = run_case(runner, manifest, features, case)
        # The record's cases hold a multi-mask and a single-mask run.
        decode_seconds = (time.perf_counter() - encoded) / 2
        encode_seconds = encoded - start
        verdict = judge(record.compare_features(case.image, maps, limits))
        if verdict.passed:
            verdict = judge(record.compare_case(case, answer, limits))
        problem = "" if verdict.passed else verdict.explain()
    except Exception as error:  # whatever is wrong with the model, a probe gets an answer
        problem = f"{type(error).__name__}: {error}"
    return Health(
        not problem,
        problem,
        name,
        device,
        precision,
        manifest.fingerprint,
        encode_seconds,
        decode_seconds,
    )
