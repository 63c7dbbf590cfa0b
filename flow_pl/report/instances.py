"""Draw the most local and the most global instances: pixels, coloured tokens, or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flow_pl.report.names import Kind, tokens_of, visible
from flow_pl.report.route_figures import BRANCH_COLORS
from flow_pl.report.routes import Floats, Instance
from flow_pl.results.curves import SIZE

RIGHT, WRONG = "#1B7F3B", "#B3261E"

COLUMNS = 4
"""Instances per row."""

LINE = 44
"""Characters per line of a drawn text."""


def picture(instances: Sequence[Instance], kind: Kind, classes: Sequence[str], tokens: Sequence[str] | None) -> Figure:
    """Draw instances, each with its class and its mean probability of the local branch.

    Args:
        instances: at least one instance.
        kind: how to draw an instance.
        classes: names of the classes.
        tokens: names of the tokens, for texts.
    """
    if kind == "text":
        return _texts(instances, tokens)
    rows = -(-len(instances) // COLUMNS)
    height = 1.45 if kind == "image" else 0.8
    figure = Figure(figsize=(SIZE[0], height * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes, instance in zip(panels, instances, strict=False):
        _show(axes, instance, kind)
        axes.set_title(f"{label_of(instance, classes)}  {100 * instance.share:.0f} %", fontsize=8, parse_math=False)
        if np.asarray(instance.label).dtype.kind == "f":  # a real value is neither right nor wrong
            continue
        marks = [("g", instance.generalized), ("p", instance.personalized)]
        for x, (letter, right) in zip((0.3, 0.7), marks, strict=True):
            sign = "✓" if right.all() else "✗"
            axes.text(
                x, -0.06, f"{letter} {sign}", transform=axes.transAxes, ha="center", va="top", fontsize=7.5,
                color=RIGHT if right.all() else WRONG,
            )  # fmt: skip
    for axes in panels:
        axes.set_axis_off()
    return figure


def label_of(instance: Instance, classes: Sequence[str]) -> str:
    """Return the class name(s) or the real value(s) of an instance; a question mark if unknown."""
    label = np.atleast_1d(instance.label)
    if label.dtype.kind == "f":
        return ", ".join("?" if np.isnan(value) else f"{value:.4g}" for value in label)
    if (label < 0).all():
        return "?"
    numbers = label if len(label) == 1 else np.flatnonzero(label > 0)
    return ", ".join(classes[int(number)] for number in numbers)


def token_probabilities(instance: Instance) -> Floats:
    """Return, for each token, the mean probability [T] of the local branch over the blocks; NaN for padding."""
    probabilities = np.where(instance.mask, instance.local.mean(-1), np.nan)
    return np.full(len(np.ravel(instance.x)), probabilities) if probabilities.ndim == 0 else probabilities


def probability_range(instances: Sequence[Instance]) -> tuple[float, float]:
    """Return the probabilities at both ends of the colour scale, which covers nearly all tokens shown."""
    probabilities = np.concatenate([token_probabilities(instance) for instance in instances])
    low, high = np.nanquantile(probabilities, (0.02, 0.98))
    return (float(low), float(high)) if high - low > 1e-6 else (0.0, 1.0)


def probability_color(probability: float, low: float, high: float) -> str:
    """Return the colour of a probability of the local branch, as #rrggbb."""
    red, green, blue, _ = (
        round(255 * float(part)) for part in BRANCH_COLORS(0.15 + 0.7 * (probability - low) / (high - low))
    )
    return f"#{red:02x}{green:02x}{blue:02x}"


def _show(axes: Axes, instance: Instance, kind: Kind) -> None:
    x = np.asarray(instance.x, dtype=np.float64)
    if kind == "image":
        pixels = np.moveaxis(x, 0, -1) if x.ndim == 3 else x
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low) if high > low else pixels
        axes.imshow(pixels.squeeze(), cmap="gray_r")
    else:
        bound = float(np.abs(x).max()) or 1.0
        axes.imshow(x.reshape(1, -1), cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto")


def _texts(instances: Sequence[Instance], names: Sequence[str] | None) -> Figure:
    """Draw coloured tokens in lines of a fixed width, since a figure does not reflow."""
    low, high = probability_range(instances)
    words = names is None or max(map(len, names[4:]), default=0) > 1
    cells: list[tuple[int, int, str, str]] = []
    line = 0
    for instance in instances:
        column = 0
        for token, probability in zip(tokens_of(instance.x, names), token_probabilities(instance), strict=True):
            if np.isnan(probability):
                continue
            text = visible(token) + (" " if words else "")
            if column + len(text) > LINE:
                line, column = line + 1, 0
            cells.append((line, column, text, probability_color(float(np.clip(probability, low, high)), low, high)))
            column += len(text)
        line += 2
    figure = Figure(figsize=(SIZE[0], 0.17 * line))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, LINE), ylim=(line - 0.5, -0.6))
    axes.set_axis_off()
    for row, column, text, color in cells:
        axes.fill_between([column, column + len(text.rstrip())], row - 0.48, row + 0.48, color=color, linewidth=0)
        axes.text(column, row, text, family="monospace", fontsize=7.2, va="center", parse_math=False)
    return figure
