"""The gate: what a faster or narrower way of running a bundle must reach before it may serve.

FP16 and BF16 engines of this network have come out silently wrong elsewhere, with feature cosines
between 0.04 and 0.9 and a build log that says all is well. So nothing that computes in less than
FP32 is used before it has run on the bundle's parity record and met these limits on the machine
that will serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..bundle import ParityLimits
from .record import Measurement

# Cosine and mask IoU are the promise. The others catch what those two cannot see: an outlier
# channel, a scale, an IoU head that answers something else. They sit a few times above what BF16,
# the coarsest type that is let through, was measured to do.
GATE_LIMITS = ParityLimits(
    feature_error=0.1, feature_cosine=0.999, logit_error=0.1, iou_error=0.05, mask_iou=0.99
)


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


def judge(
    measurements: Iterable[Measurement], progress: Callable[[Measurement], None] | None = None
) -> Verdict:
    """Collect measurements as they are made.

    Args:
        measurements: such as :func:`sam3rt.accuracy.record.verify_model` yields.
        progress: called with each.
    """
    made = []
    for measurement in measurements:
        made.append(measurement)
        if progress is not None:
            progress(measurement)
    return Verdict(tuple(made))
