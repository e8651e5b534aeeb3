"""A result as pictures. Needs matplotlib."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sam3rt.bundle.files import atomic_write
from sam3rt.errors import BackendError

from .document import Curve, Result

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMALL, _INK, _FAINT = 8, "#222222", "#dddddd"


def draw_plots(result: Result, folder: Path) -> list[Path]:
    """Write the plots a result has data for, as PNG files.

    Returns:
        What was written.

    Raises:
        BackendError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BackendError("plots need matplotlib: pip install 'sam3rt[bench]'") from error
    # Draws into files; no window, whatever the machine has.
    matplotlib.use("Agg", force=True)
    written = []
    for name, figure in (
        ("calls", _draw_calls(result)),
        ("curves", _draw_curves(result)),
        ("limits", _draw_limits(result)),
    ):
        if figure is not None:
            written.append(_save(figure, folder / f"{name}.png"))
    return written


def _draw_calls(result: Result) -> Any:
    if not result.calls:
        return None
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    calls = list(dict.fromkeys(row.call for row in result.calls))
    candidates = [c.name for c in result.candidates]
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.2 + 0.28 * len(candidates) * 5), width_ratios=(1, 2)
    )
    for axis, chosen in zip(axes, (calls[:1], calls[1:]), strict=True):
        labels, position = [], 0.0
        for call in chosen:
            rows = {row.candidate: row.times for row in result.calls if row.call == call}
            for index, name in enumerate(candidates):
                times = rows[name]
                axis.barh(position, times.median_ms, 0.8, color=_COLOURS[index % len(_COLOURS)])
                axis.plot([times.min_ms, times.p95_ms], [position] * 2, color=_INK, linewidth=1)
                axis.annotate(
                    _duration(times.median_ms),
                    (max(times.median_ms, times.p95_ms), position),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=_SMALL,
                    color=_INK,
                )
                labels.append((position, call if index == (len(candidates) - 1) // 2 else ""))
                position += 1
            position += 0.8
        axis.set_yticks([p for p, _ in labels], [t for _, t in labels], fontsize=_SMALL + 1)
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.set_xlabel("milliseconds, median; line: fastest to 95th percentile", fontsize=_SMALL)
        _plain(axis, "x")
    handles = [
        Rectangle((0, 0), 1, 1, color=_COLOURS[i % len(_COLOURS)]) for i in range(len(candidates))
    ]
    shown = [_with_agreement(result, name) for name in candidates]
    figure.legend(
        handles, shown, loc="lower center", ncols=min(3, len(shown)), fontsize=_SMALL, frameon=False
    )
    _title(figure, result, "One image, one call")
    legend_inches = 0.1 + 0.2 * -(-len(shown) // 3)
    figure.tight_layout(rect=(0, legend_inches / figure.get_figheight(), 1, 1))
    return figure


def _with_agreement(result: Result, name: str) -> str:
    for row in result.agreement:
        if row.candidate == name and row.reference != name:
            return f"{name} (mean mask IoU {row.mean_iou:.4f})"
    return name


def _draw_curves(result: Result) -> Any:
    names = [
        n
        for n in dict.fromkeys(curve.name for curve in result.curves)
        if any(len(c.points) > 1 for c in result.curves if c.name == n) and n != "embedding files"
    ]
    if not names:
        return None
    import matplotlib.pyplot as plt

    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.8 * columns, 3.1 * lines + 0.8), squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        for index, curve in enumerate(c for c in result.curves if c.name == name):
            _draw_curve(axis, curve, _COLOURS[index % len(_COLOURS)])
        # Once all are drawn: it ends the fitting of the upper limit.
        axis.set_ylim(bottom=0)
        axis.set_title(f"{name}", fontsize=_SMALL + 2, loc="left", color=_INK)
        axis.legend(fontsize=_SMALL - 1, frameon=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    _title(figure, result, "How the duration depends on ...")
    figure.tight_layout()
    return figure


def _draw_curve(axis: Any, curve: Curve, colour: str) -> None:
    x = [point.x for point in curve.points]
    axis.plot(
        x,
        [point.times.median_ms for point in curve.points],
        marker="o",
        markersize=4,
        color=colour,
        label=curve.candidate,
    )
    axis.fill_between(
        x,
        [point.times.min_ms for point in curve.points],
        [point.times.p95_ms for point in curve.points],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(x, [point.label for point in curve.points])
    axis.minorticks_off()
    axis.set_xlabel(f"{curve.unit}: {curve.call}", fontsize=_SMALL)
    axis.set_ylabel("milliseconds", fontsize=_SMALL)
    _plain(axis, "y")


def _draw_limits(result: Result) -> Any:
    if not result.limits:
        return None
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.32 * len(result.limits)))
    for index, row in enumerate(result.limits):
        axis.barh(index, row.measured_ms, 0.7, color="#9ecae1")
        axis.barh(index, row.limit_ms, 0.7, color=_COLOURS[0])
        axis.annotate(
            f"{row.ratio:.2g} x",
            (max(row.measured_ms, row.limit_ms), index),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
            color=_INK,
        )
    axis.set_yticks(
        range(len(result.limits)),
        [f"{row.stage}, {row.candidate}" for row in result.limits],
        fontsize=_SMALL,
    )
    axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.set_xlabel(
        "milliseconds: measured (light), and at the machine's ceilings (dark)", fontsize=_SMALL
    )
    _plain(axis, "x")
    _title(figure, result, "Distance to the limit")
    figure.tight_layout()
    return figure


def _title(figure: Any, result: Result, text: str) -> None:
    height, width = result.image
    figure.suptitle(
        f"{text}: {result.model.name}, {width}x{height}\n{result.machine.processor}, "
        f"{result.machine.cores} cores" + "".join(f", {a}" for a in result.machine.accelerators),
        fontsize=_SMALL + 3,
        x=0.01,
        ha="left",
        color=_INK,
    )


def _plain(axis: Any, grid: str) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis=grid, color=_FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=_SMALL)


def _duration(milliseconds: float) -> str:
    return f"{milliseconds / 1e3:.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    plt.close(figure)
    with atomic_write(path) as stream:
        stream.write(buffer.getvalue())
    return path
