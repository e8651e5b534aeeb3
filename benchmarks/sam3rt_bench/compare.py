"""Two results against each other, for regressions."""

from __future__ import annotations

from dataclasses import dataclass

from .document import Result, Times
from .markdown import milliseconds, table


@dataclass(frozen=True)
class Change:
    """One row that both results have.

    Attributes:
        what: the row.
        before: durations in the first result.
        after: durations in the second.
        is_slower: beyond the tolerance and the spread of both.
        is_faster: likewise.
    """

    what: str
    before: Times
    after: Times
    is_slower: bool
    is_faster: bool

    @property
    def ratio(self) -> float:
        """The second median over the first."""
        return self.after.median_ms / max(self.before.median_ms, 1e-9)


def compare_results(before: Result, after: Result, tolerance: float) -> list[Change]:
    """Rows that both results have.

    A change counts where the medians differ by more than the tolerance, and the quartiles do not
    overlap either, by the larger of the two spreads.

    Args:
        before: the first result.
        after: the second.
        tolerance: share of the first median, such as 0.1.
    """
    old, new = _rows(before), _rows(after)
    changes = []
    for what, first in old.items():
        second = new.get(what)
        if second is None:
            continue
        allowed = max(tolerance, first.spread, second.spread)
        ratio = second.median_ms / max(first.median_ms, 1e-9)
        changes.append(Change(what, first, second, ratio > 1 + allowed, ratio < 1 / (1 + allowed)))
    return changes


def lost_agreement(before: Result, after: Result) -> list[str]:
    """Candidates whose masks are further from FP32's than before, in words."""
    old = {row.candidate: row.mean_iou for row in before.agreement}
    return [
        f"{row.candidate}: mean mask IoU {old[row.candidate]:.4f} before, {row.mean_iou:.4f} now"
        for row in after.agreement
        if row.candidate in old and row.mean_iou < old[row.candidate] - 0.002
    ]


def missing_rows(before: Result, after: Result) -> list[str]:
    """What only the first result has: nobody knows whether it is slower now."""
    return [f"{what}: not in the second" for what in _rows(before).keys() - _rows(after).keys()]


def same_conditions(before: Result, after: Result) -> list[str]:
    """What differs between two results besides the code, in words."""
    return [
        f"{name}: {a} before, {b} now"
        for name, a, b in (
            ("processor", before.machine.processor, after.machine.processor),
            ("cores", before.machine.cores, after.machine.cores),
            ("accelerators", before.machine.accelerators, after.machine.accelerators),
            ("model", before.model.fingerprint[:16], after.model.fingerprint[:16]),
            ("image", before.image, after.image),
        )
        if a != b
    ]


def to_markdown(changes: list[Change]) -> str:
    """The rows as a table, slower ones first."""
    rows = [
        [
            change.what,
            milliseconds(change.before.median_ms),
            milliseconds(change.after.median_ms),
            f"{change.ratio:.2f}",
            "slower" if change.is_slower else "faster" if change.is_faster else "",
        ]
        for change in sorted(changes, key=lambda c: -c.ratio)
    ]
    return "\n".join(table(("", "before, ms", "after, ms", "ratio", ""), rows))


def _rows(result: Result) -> dict[str, Times]:
    rows: dict[str, Times] = {}
    for stage in result.stages:
        rows[f"{stage.candidate}: {stage.stage} ({stage.clock} clock)"] = stage.times
    for call in result.calls:
        rows[f"{call.candidate}: {call.call}"] = call.times
    for curve in result.curves:
        for point in curve.points:
            rows[f"{curve.candidate}: {curve.name} {point.label}"] = point.times
    return rows
