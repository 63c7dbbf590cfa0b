"""Draw the figures of a comparison: learning curves, clients, routes, bars (Panchal et al., 2023, Figures 2 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from flow_pl.results.plotting import (
    COLORS,
    POPULATION_COLORS,
    bar_place,
    grid,
    horizontal_bars,
    label_ends,
    line_style,
    save,
)
from flow_pl.results.runs import Comparison, client_key
from flow_pl.results.statistics import Spread, spread

MODELS = {"generalized": "generalized (server's model)", "personalized": "personalized (client's model)"}


def learning_curves(comparison: Comparison) -> Figure | None:
    """Draw the validation accuracy of both models over the rounds: mean and standard deviation over runs.

    A method that was validated once, such as one without rounds, is drawn as a horizontal line.
    """
    if not any(comparison.curves(method, f"{model}_accuracy") for method in comparison.methods for model in MODELS):
        return None
    figure = Figure(figsize=(11.5, 4.6))
    room = 0.3 + 0.019 * max(map(len, comparison.methods))  # space for the labels, in panel widths
    panels = figure.subplots(1, 2, gridspec_kw={"wspace": room})
    for axes, (model, title) in zip(panels, MODELS.items(), strict=True):
        ends, last, several = [], 1, False
        for index, method in enumerate(comparison.methods):
            curve = comparison.curves(method, f"{model}_accuracy")
            if curve:
                look = line_style(index)
                ends.append((method, _curve(axes, curve, look), look))
                last, several = max(last, *curve), several or len(curve) > 1
        axes.set(title=title, xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0)
        if not several:  # horizontal lines set no limits
            axes.set_xlim(0, last)
        label_ends(axes, ends)
    panels[0].set_ylabel(f"validation {comparison.accuracy} (%)")
    if comparison.repeats > 1:
        figure.text(0.5, -0.03, f"lines: mean over {comparison.over}; bands: ± 1 standard deviation", ha="center")
    return figure


def _curve(axes: Axes, curve: Mapping[int, list[float]], look: Mapping[str, Any]) -> float:
    """Draw a curve with its band; return its last value in percent."""
    values = [_required(spread(found)) for found in curve.values()]
    mean = 100 * np.array([value.mean for value in values])
    band = 100 * np.array([value.deviation or 0.0 for value in values])
    if len(curve) == 1:
        axes.axhline(mean[0], linewidth=1.2, **look)
    else:
        axes.plot(list(curve), mean, linewidth=1.6, **look)
        axes.fill_between(list(curve), mean - band, mean + band, color=look["color"], alpha=0.15, linewidth=0)
    return float(mean[-1])


def client_scatter(comparison: Comparison) -> Figure | None:
    """Draw each client's accuracy with w_g and with its own model, one panel per method; areas grow with its data."""
    shown = {
        client_key(run, client): client.examples
        for runs in comparison.methods.values()
        for run in runs
        for client in run.clients
        if client.population in comparison.populations
    }
    if not shown:
        return None
    largest = max(shown.values())
    figure, panels = grid(len(comparison.methods), 4, 2.3, 2.55)
    for axes, method in zip(panels, comparison.methods, strict=True):
        gains, lowest = [], 0.0
        for population, color in zip(comparison.populations, POPULATION_COLORS, strict=False):
            personalized = comparison.client_accuracies(method, population, "personalized")
            generalized = comparison.client_accuracies(method, population, "generalized")
            x, y = (100 * np.array(list(values.values())) for values in (generalized, personalized))
            areas = [_area(shown.get(name, 0), largest) for name in generalized]
            axes.scatter(x, y, s=areas, color=color, alpha=0.5, linewidth=0.3, edgecolor="white", zorder=2)
            gains += list(np.round(y - x, 9))
            lowest = min([lowest, *(value for value in (*x, *y) if isfinite(value))])
        helped, harmed = (100 * np.mean([sign * gain > 0 for gain in gains]) for sign in (1, -1))
        undefined = 100 * np.mean(np.isnan(gains))
        axes.set_title(method, pad=15)
        changed = f"helped {helped:.0f} %, harmed {harmed:.0f} %"
        changed += f", diverged {undefined:.0f} %" if undefined else ""
        axes.text(0.5, 1.02, changed, transform=axes.transAxes, ha="center", va="bottom", fontsize=8, color="#555555")
        # R2, the accuracy of real values, may be negative
        axes.plot([lowest, 100], [lowest, 100], color="#666666", linewidth=0.8, zorder=1)
        axes.set(xlim=(1.03 * lowest - 3, 103), ylim=(1.03 * lowest - 3, 103))
    figure.supxlabel(f"{comparison.accuracy} of the server's model on a client (%)", fontsize=9)
    figure.supylabel(f"{comparison.accuracy} of the client's own model (%)", fontsize=9)
    sizes = sorted({min(shown.values()), int(np.median(list(shown.values()))), largest})
    dots = {f"{population} clients": (color, 36.0) for population, color in _populations(comparison)}
    dots |= {f"{size} training examples": ("#888888", _area(size, largest)) for size in sizes}
    handles = [
        Line2D([], [], linestyle="", marker="o", color=color, alpha=0.7, markersize=np.sqrt(area), label=label)
        for label, (color, area) in dots.items()
    ]
    if len(panels) == 1:
        figure.legend(handles=handles, loc="outside upper center", ncols=2)
    else:
        figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _area(examples: int, largest: int) -> float:
    """Return the area of a client's dot, in square points."""
    return 4 + 66 * examples / largest


def routes(comparison: Comparison) -> Figure | None:
    """Draw the share of decisions routed locally, per block, one panel for each method that routes."""
    prefix = "routed_local/"
    blocks: dict[str, list[str]] = {}
    for method, runs in comparison.methods.items():
        metrics = dict.fromkeys(
            name for run in runs for p in comparison.populations for name in run.populations.get(p, {})
        )
        named = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
        if named:
            blocks[method] = named
    if not blocks:
        return None
    most = max(map(len, blocks.values()))
    figure, panels = grid(len(blocks), 4, 2.9, 0.9 + 0.22 * most * len(comparison.populations))
    for axes, (method, names) in zip(panels, blocks.items(), strict=True):
        bars = {
            name: [spread(comparison.values(method, p, prefix + name)) for p in comparison.populations]
            for name in names
        }
        horizontal_bars(axes, bars, "{:.0f}")
        axes.set(title=method, xlim=(0, 118), xticks=range(0, 101, 25))
    figure.supxlabel(f"routed local (% of decisions){_seeds(comparison)}", fontsize=9)
    _population_legend(figure, comparison)
    return figure


def accuracy_bars(comparison: Comparison) -> Figure | None:
    """Draw the personalized test accuracy of each method, with w_g's as a line; error bars over runs.

    The best method is on top, those whose accuracy is undefined are at the bottom.
    """
    metric = {model: f"{model}_accuracy" for model in MODELS}
    values = {
        method: [spread(comparison.values(method, p, metric["personalized"])) for p in comparison.populations]
        for method in comparison.methods
    }
    means = {method: found[0].mean if found[0] is not None else -inf for method, found in values.items()}
    ranked = sorted(values, key=means.__getitem__, reverse=True)
    figure = Figure(figsize=(6.4, 1.2 + 0.26 * len(ranked) * len(comparison.populations)), layout="constrained")
    axes = figure.subplots()
    horizontal_bars(axes, {method: values[method] for method in ranked}, "{:.1f}")
    lowest = min([0.0, *(100 * each.mean for found in values.values() for each in found if each is not None)])
    for row, method in enumerate(ranked):
        for place, population in enumerate(comparison.populations):
            server = spread(comparison.values(method, population, metric["generalized"]))
            if server is not None:
                lowest = min(lowest, 100 * server.mean)
                y, height = bar_place(row, place, len(comparison.populations))
                axes.vlines(100 * server.mean, y - height / 2, y + height / 2, color=COLORS[6], linewidth=1.6)
    axes.set(xlabel=f"personalized test {comparison.accuracy} (%){_seeds(comparison)}", xlim=(1.08 * lowest, None))
    axes.set_xlim(right=max(axes.get_xlim()[1], 0) * 1.08)
    _population_legend(figure, comparison, Line2D([], [], color=COLORS[6], linewidth=1.6, label="server's model"))
    return figure


def _seeds(comparison: Comparison) -> str:
    return f", mean ± standard deviation over {comparison.over}" if comparison.repeats > 1 else ""


def _populations(comparison: Comparison) -> list[tuple[str, str]]:
    return list(zip(comparison.populations, POPULATION_COLORS, strict=False))


def _population_legend(figure: Figure, comparison: Comparison, *others: Line2D) -> None:
    squares = [
        Line2D([], [], linestyle="", marker="s", color=color, label=f"{population} clients")
        for population, color in _populations(comparison)
    ]
    figure.legend(handles=[*squares, *others], loc="outside upper center", ncols=3)


def _required(value: Spread | None) -> Spread:
    assert value is not None
    return value


FIGURES: dict[str, Callable[[Comparison], Figure | None]] = {
    "curves": learning_curves,
    "clients": client_scatter,
    "routes": routes,
    "accuracy": accuracy_bars,
}
"""Drawing functions by file name."""


def draw(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw all figures that have something to show.

    Args:
        comparison: the results to draw.
        folder: output folder.

    Returns:
        The files, by name.
    """
    paths = {name: folder / f"{name}.png" for name in FIGURES}
    return {name: path for name, path in paths.items() if save(partial(FIGURES[name], comparison), path)}
