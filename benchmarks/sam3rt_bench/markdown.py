"""A result as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .document import Curve, Result, Times

# Candidates in the summary, fastest first.
_SUMMARY_CANDIDATES = 5


def to_markdown(result: Result) -> str:
    """All tables, with what they are from."""
    height, width = result.image
    machine = result.machine
    memory = "" if machine.memory_gb is None else f", {machine.memory_gb:g} GB"
    if machine.load_average is not None:
        memory += f", load average {machine.load_average:g} before"
    accelerators = "".join(f", {name}" for name in machine.accelerators)
    lines = [
        f"# {result.model.name}, {width}x{height}",
        "",
        f"{machine.processor}, {machine.cores} cores{memory}{accelerators}; {machine.platform}; "
        f"Python {machine.python}; "
        + ", ".join(f"{name} {version}" for name, version in result.versions.items())
        + f"; revision {result.revision or 'unknown'}; {result.created}.",
        "",
        f"    {result.command}",
        "",
    ]
    if result.model.note:
        lines += [result.model.note, ""]
    if result.quick:
        lines += ["A quick look: too few repetitions to report.", ""]
    lines += _calls(result) + _agreement(result) + _stages(result) + _starts(result)
    for curve_name in dict.fromkeys(curve.name for curve in result.curves):
        lines += _curves([c for c in result.curves if c.name == curve_name])
    lines += _limits(result)
    if result.skipped:
        lines += ["## Not measured", "", *(f"- {line}" for line in result.skipped), ""]
    return "\n".join(lines)


def summary(result: Result, seconds: float) -> str:
    """A few short lines for a person.

    Args:
        result: what was measured.
        seconds: how long that took.
    """
    height, width = result.image
    lines = [
        "=== Summary ===",
        f"{result.model.name} at {width}x{height} on {result.machine.processor}, "
        f"{result.machine.cores} cores; measured in {seconds:.0f} s",
    ]
    times = {(row.candidate, row.call): row.times for row in result.calls}
    near = {row.candidate: row.mean_iou for row in result.agreement}
    fastest = sorted(
        {row.candidate for row in result.calls},
        key=lambda name: times[name, "set_image"].median_ms,
    )
    rows = [("", "image", "click", "click, p95", "clicks/s", "mask IoU")] if fastest else []
    for name in fastest[:_SUMMARY_CANDIDATES]:
        image, one = times[name, "set_image"], times[name, "predict: one click"]
        rows.append(
            (
                name,
                f"{milliseconds(image.median_ms)} ms",
                f"{milliseconds(one.median_ms)} ms",
                f"{milliseconds(one.p95_ms)} ms" if one.count > 1 else "-",
                f"{1e3 / max(one.median_ms, 1e-6):.3g}",
                f"{near[name]:.4f}" if name in near else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        shown = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *shown]))
    if fastest:
        against = f"; mask IoU: the mean against {result.agreement[0].reference}" if near else ""
        slower = f"; {len(fastest) - _SUMMARY_CANDIDATES} slower ones above"
        lines.append(f"medians{against}{slower * (len(fastest) > _SUMMARY_CANDIDATES)}")
    if result.limits:
        encodes = [row for row in result.limits if row.stage == "encode"]
        best = min(encodes or result.limits, key=lambda row: row.measured_ms)
        lines.append(
            f"limit: {best.candidate} takes {ratio(best.ratio)} times as long for {best.stage} as "
            "this machine's ceilings allow"
        )
    if result.skipped:
        left_out = ", ".join(line.partition(": ")[0] for line in result.skipped)
        lines.append(f"not measured: {left_out} (reasons above)")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table with a blank line after it."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, ""]


def milliseconds(value: float) -> str:
    """Three significant digits or whole milliseconds."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float) -> str:
    """Three significant digits or a whole number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(times: Times) -> list[str]:
    shown = [times.median_ms, times.p95_ms, times.p99_ms]
    return [*map(milliseconds, shown), f"{100 * times.spread:.0f} %", str(times.count)]


_TIMES = ("median, ms", "p95", "p99", "spread", "times")


def _calls(result: Result) -> list[str]:
    if not result.calls:
        return []
    names = [c.name for c in result.candidates]
    rows = []
    for call in dict.fromkeys(row.call for row in result.calls):
        times = {row.candidate: row.times for row in result.calls if row.call == call}
        rows.append(
            [call, *(milliseconds(times[n].median_ms) if n in times else "" for n in names)]
        )
    if result.agreement:
        # Beside the times, for speed with wrong masks is no speed.
        near = {row.candidate: f"{row.mean_iou:.4f}" for row in result.agreement}
        against = result.agreement[0].reference
        rows.append([f"mean mask IoU against {against}", *(near.get(n, "") for n in names)])
    return [
        "## Side by side",
        "",
        "NumPy in to NumPy out, the candidates in turn; medians, ms.",
        "",
        *table(("", *names), rows),
    ]


def _agreement(result: Result) -> list[str]:
    if not result.agreement:
        return []
    rows = [
        [
            row.candidate,
            f"{row.feature_cosine:.6f}",
            f"{row.mean_iou:.4f}",
            f"{row.least_iou:.4f}",
            f"{row.single_least_iou:.4f}",
        ]
        for row in result.agreement
    ]
    first = result.agreement[0]
    return [
        f"## Masks against {first.reference}",
        "",
        f"{first.masks} multi-mask masks and {first.single_masks} single masks of "
        "the prompts above, low resolution. A single mask is chosen among four: a near tie that "
        "falls otherwise is another mask.",
        "",
        *table(
            (
                "",
                "least feature cosine",
                "mean IoU",
                "least IoU",
                "single masks, least IoU",
            ),
            rows,
        ),
    ]


def _stages(result: Result) -> list[str]:
    if not result.stages:
        return []
    rows = [
        [row.stage, row.candidate, row.clock, *_times(row.times)]
        for row in sorted(result.stages, key=lambda row: row.candidate != "host")
    ]
    return ["## Stages", "", *table(("stage", "of", "clock", *_TIMES), rows)]


def _starts(result: Result) -> list[str]:
    if not result.starts:
        return []
    rows = [
        [
            row.candidate,
            *map(
                milliseconds,
                (
                    row.load_ms,
                    row.first_encode_ms,
                    row.steady_encode_ms,
                    row.first_predict_ms,
                    row.steady_predict_ms,
                ),
            ),
            "" if row.peak_host_mb is None else f"{row.peak_host_mb:.0f}",
            "" if row.peak_device_mb is None else f"{row.peak_device_mb:.0f}",
        ]
        for row in result.starts
    ]
    header = (
        "",
        "load, ms",
        "first set_image",
        "later",
        "first click",
        "later",
        "peak host memory, MB",
        "peak device memory, MB",
    )
    return ["## A fresh process", "", *table(header, rows)]


def _curves(curves: list[Curve]) -> list[str]:
    labels = [point.label for point in curves[0].points]
    rows = []
    for curve in curves:
        found = {point.label: point for point in curve.points}
        rows.append(
            [
                curve.candidate,
                *(
                    milliseconds(found[label].times.median_ms) if label in found else ""
                    for label in labels
                ),
            ]
        )
        if curve.name == "concurrent callers":
            rates = [f"{found[n].per_second:.3g}/s" if n in found else "" for n in labels]
            rows.append([f"{curve.candidate}, calls a second", *rates])
    title = curves[0].name[0].upper() + curves[0].name[1:]
    return [
        f"## {title}",
        "",
        f"{curves[0].call}; medians, ms.",
        "",
        *table(("", *labels), rows),
    ]


def _limits(result: Result) -> list[str]:
    if not result.limits:
        return []
    ceilings = [
        [
            c.what,
            c.element or "bytes",
            c.device,
            c.by,
            f"{c.per_second / 1e9:.4g} {'GB/s' if c.what == 'copy' else 'GFLOP/s'}",
        ]
        for c in result.ceilings
    ]
    rows = [
        [
            row.stage,
            row.candidate,
            f"{row.operations / 1e9:.4g}",
            f"{row.least_bytes / 1e6:.4g}",
            row.element,
            milliseconds(row.limit_ms),
            milliseconds(row.measured_ms),
            ratio(row.ratio),
        ]
        for row in result.limits
    ]
    return [
        "## Distance to the limit",
        "",
        *table(("ceiling", "of", "device", "reached by", ""), ceilings),
        "Operations are those of the graph's matrix products and convolutions; bytes are weights, "
        "inputs and outputs, each moved once. The limit is the slower of both at its ceiling.",
        "",
        *table(
            ("stage", "of", "GFLOP", "least MB", "type", "limit, ms", "measured, ms", "ratio"),
            rows,
        ),
    ]
