"""A result as pictures. Needs matplotlib."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

from sam3rt.bundle.files import atomic_write
from sam3rt.errors import BackendError

from . import PLOTS
from .document import Curve, Result
from .markdown import ratio

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMALL, _INK, _FAINT = 8, "#222222", "#dddddd"
_LINE_INCHES = 0.2


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
    figures = (_draw_calls(result), _draw_curves(result), _draw_limits(result))
    for name, figure in zip(PLOTS, figures, strict=True):
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
        1, 2, figsize=(11, 1.6 + 0.28 * len(candidates) * 5), width_ratios=(1, 2)
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
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.18)
        axis.set_xlabel("median; line: fastest to 95th percentile", fontsize=_SMALL)
        axis.xaxis.set_major_formatter(lambda value, _: _duration(value))
        _plain(axis, "x")
    # Bars of one thickness on both sides, from the top.
    for axis in axes:
        axis.set_ylim(axes[1].get_ylim()[::-1])
    handles = [
        Rectangle((0, 0), 1, 1, color=_COLOURS[i % len(_COLOURS)]) for i in range(len(candidates))
    ]
    shown = [_with_agreement(result, name) for name in candidates]
    figure.legend(
        handles, shown, loc="lower center", ncols=min(3, len(shown)), fontsize=_SMALL, frameon=False
    )
    _title(figure, result, "One image, one call")
    _lay_out(figure, legend_inches=0.1 + 0.2 * -(-len(shown) // 3))
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
        axis.set_title(f"{name}", fontsize=_SMALL + 2, loc="left", color=_INK)
        axis.legend(fontsize=_SMALL - 1, frameon=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    _title(figure, result, "How the duration depends on ...")
    _lay_out(figure)
    return figure


def _draw_curve(axis: Any, curve: Curve, colour: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

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
    # Both axes logarithmic: a cost in proportion is a straight line.
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: _duration(value))
    _plain(axis, "y")


def _draw_limits(result: Result) -> Any:
    if not result.limits:
        return None
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.32 * len(result.limits)))
    for index, row in enumerate(result.limits):
        # Dots: the length of a bar says nothing on a logarithmic axis.
        axis.plot([row.limit_ms, row.measured_ms], [index] * 2, color=_FAINT, linewidth=2, zorder=1)
        axis.plot(
            row.limit_ms, index, "|", color=_INK, markersize=9, label="at the machine's ceilings"
        )
        axis.plot(row.measured_ms, index, "o", color=_COLOURS[0], markersize=6, label="measured")
        axis.annotate(
            f"{ratio(row.ratio)} x",
            (max(row.measured_ms, row.limit_ms), index),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
            color=_INK,
        )
    axis.legend(
        *(entries[:2] for entries in axis.get_legend_handles_labels()),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
        fontsize=_SMALL,
        frameon=False,
    )
    axis.set_yticks(
        range(len(result.limits)),
        [f"{row.stage}, {row.candidate}" for row in result.limits],
        fontsize=_SMALL,
    )
    axis.set_xscale("log")
    axis.margins(x=0.1)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(lambda value, _: _duration(value))
    _plain(axis, "x")
    _title(figure, result, "Distance to the limit")
    _lay_out(figure)
    return figure


def _title(figure: Any, result: Result, text: str) -> None:
    """Say what was measured, where, and what the model's note warns of."""
    height, width = result.image
    lines = [
        f"{text}: {result.model.name}, {width}x{height}",
        f"{result.machine.processor}, {result.machine.cores} cores"
        + "".join(f", {a}" for a in result.machine.accelerators),
        *textwrap.wrap(result.model.note, int(figure.get_figwidth() * 11)),
    ]
    for number, line in enumerate(lines):
        figure.text(
            0.01,
            1 - (0.1 + _LINE_INCHES * number) / figure.get_figheight(),
            line,
            fontsize=_SMALL + (3 if number == 0 else 1),
            va="top",
            color=_INK,
        )
    figure.title_inches = 0.2 + _LINE_INCHES * len(lines)


def _lay_out(figure: Any, legend_inches: float = 0) -> None:
    """Leave room for the title's lines above, and for a legend below."""
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, legend_inches / height, 1, 1 - figure.title_inches / height))


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
