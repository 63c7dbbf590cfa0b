"""Shared parts of the figures: colours, styles, labels that do not overlap, and PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flow_pl.results.statistics import Spread
from flow_pl.utils.files import write_bytes

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colour-blind-safe palette of Okabe and Ito (Color Universal Design, 2008), without the yellow."""

DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))

POPULATION_COLORS = (COLORS[0], COLORS[4], COLORS[2])

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the common figure style within the context."""
    with matplotlib.rc_context(_STYLE):
        yield


def line_style(index: int) -> dict[str, Any]:
    """Return colour and dashes of the method with this index; the first 28 are distinct."""
    styles = [(color, dashes) for dashes, color in product(DASHES, COLORS)]
    color, dashes = styles[index % len(styles)]
    return {"color": color, "linestyle": dashes}


def label_heights(values: Sequence[float], low: float, high: float, gap: float) -> list[float]:
    """Return label heights as close to the values as possible, at least a gap apart.

    Args:
        values: heights of the lines' ends.
        low: smallest height.
        high: largest height; exceeded only if there are too many labels.
        gap: smallest distance between labels.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    # Labels that would overlap form a block around the mean of their values, minus the gaps below them; a block that
    # comes too close to the one below merges with it.
    blocks: list[tuple[float, int]] = []
    for place, index in enumerate(order):
        start, size = values[index] - place * gap, 1
        while blocks and blocks[-1][0] > start:
            below, others = blocks.pop()
            start, size = (start * size + below * others) / (size + others), size + others
        blocks.append((start, size))
    starts = [start for start, size in blocks for _ in range(size)]
    heights = [0.0] * len(values)
    for place, (index, start) in enumerate(zip(order, starts, strict=True)):
        heights[index] = max(min(start, high - (len(values) - 1) * gap), low) + place * gap
    return heights


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, dict[str, Any]]], font_size: float = 8.5) -> None:
    """Label lines at their right ends, outside the axes: a thin connector, a sample of the line, and the text.

    Args:
        axes: the axes, with their final limits.
        ends: text, height and line style of each line.
        font_size: font size in points.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    low, high = axes.get_ylim()
    height_points = axes.get_position().height * figure.get_figheight() * 72
    gap = 1.25 * font_size * (high - low) / height_points
    heights = label_heights([height for _, height, _ in ends], low, high, gap)
    across = axes.get_yaxis_transform()  # x in axes widths, y in data coordinates
    for (text, value, look), height in zip(ends, heights, strict=True):
        pieces = (((1.0, value), (1.05, height), {"color": look["color"], "linewidth": 0.6}),
                  ((1.05, height), (1.13, height), {**look, "linewidth": 1.6}))  # fmt: skip
        for start, end, drawn in pieces:
            line = {"arrowstyle": "-", "shrinkA": 0, "shrinkB": 0, **drawn}
            axes.annotate(
                "", xy=start, xytext=end, xycoords=across, textcoords=across, annotation_clip=False, arrowprops=line
            )
        axes.text(1.15, height, text, transform=across, color=look["color"], fontsize=font_size, va="center")


def grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Create a figure of equal panels with shared axes; cells without a panel stay empty.

    Args:
        panels: number of panels.
        columns: largest number of columns.
        width: width of a panel in inches.
        height: height of a panel in inches.
    """
    columns = min(columns, panels)
    if panels == 1:
        width, height = 1.5 * width, 1.5 * height
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)))
    for empty in axes[panels:]:
        empty.remove()
    for index in range(max(panels - columns, 0), panels):
        axes[index].tick_params(labelbottom=True)
    return figure, axes[:panels]


def horizontal_bars(axes: Axes, rows: Mapping[str, Sequence[Spread | None]], number: str) -> None:
    """Draw groups of horizontal bars, the first on top, with error bars and values.

    Args:
        axes: the axes to draw in.
        rows: shares by group name, one for each population; None leaves a gap.
        number: format of the values, in percent.
    """
    bars = max(map(len, rows.values()))
    for place, color in zip(range(bars), POPULATION_COLORS, strict=False):
        known = [(row, spreads[place]) for row, spreads in enumerate(rows.values())]
        shown = [(bar_place(row, place, bars), value) for row, value in known if value is not None]
        deviations = [np.nan if value.deviation is None else 100 * value.deviation for _, value in shown]
        drawn = axes.barh(
            [centre for (centre, _), _ in shown],
            [100 * value.mean for _, value in shown],
            height=[height for (_, height), _ in shown],
            color=color,
            xerr=None if np.isnan(deviations).all() else deviations,
            error_kw={"linewidth": 1.0, "capsize": 2, "ecolor": "#444444"},
        )
        texts = [number.format(100 * value.mean) for _, value in shown]
        texts = [
            text if np.isnan(deviation) else f"{text} ± {number.format(deviation)}"
            for text, deviation in zip(texts, deviations, strict=True)
        ]
        axes.bar_label(drawn, texts, padding=3, fontsize=7.5)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)


def bar_place(row: int, place: int, bars: int) -> tuple[float, float]:
    """Return centre and height of the `place`-th bar of a group."""
    height = 0.8 / bars
    return row + (place - (bars - 1) / 2) * height, 0.92 * height


def save(make: Callable[[], Figure | None], path: Path) -> bool:
    """Draw a figure to a PNG file; if there is nothing to draw, remove an older file.

    Args:
        make: makes the figure; returns None if there is nothing to draw.
        path: path of the file.

    Returns:
        Whether a figure was written.
    """
    with style():
        figure = make()
        if figure is None:
            path.unlink(missing_ok=True)
            return False
        content = io.BytesIO()
        FigureCanvasAgg(figure)
        figure.savefig(content, format="png", dpi=160, bbox_inches="tight", facecolor="white")
    write_bytes(path, content.getvalue())
    return True
