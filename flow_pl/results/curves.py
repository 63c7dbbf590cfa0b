"""Draw the accuracies and the share routed locally over the rounds of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flow_pl.results.plotting import COLORS, line_style
from flow_pl.results.runs import Metrics

SIZE = (3.9, 2.9)
"""Size of a figure in inches, readable on a phone without zooming."""

MODEL_COLORS = {"generalized": COLORS[6], "personalized": COLORS[1]}
"""Colours of the server's model and the clients' models, in every figure that shows both."""


def accuracy_curves(
    curve: Mapping[int, Metrics], tested: int | None = None, accuracy: str = "accuracy"
) -> Figure | None:
    """Draw the validation accuracy of both models over the rounds: mean over clients, and a band.

    The band covers the 10th to the 90th percentile of the clients validated in that round.

    Args:
        curve: validation metrics by round.
        tested: round of the tested model, which is marked; None for no mark.
        accuracy: name of the accuracy.
    """
    if not any(f"{model}_accuracy_client_mean" in metrics for model in MODEL_COLORS for metrics in curve.values()):
        return None
    figure, axes = _rounds(f"validation {accuracy} (%)")
    for model, color in MODEL_COLORS.items():
        names = [f"{model}_accuracy_{name}" for name in ("client_mean", "p10", "p90")]
        found = [(number, *(metrics.get(name) for name in names)) for number, metrics in curve.items()]
        rows = [row for row in found if None not in row]
        if not rows:
            continue
        rounds, *columns = zip(*rows, strict=True)
        mean, low, high = ([100 * (value or 0.0) for value in column] for column in columns)
        axes.fill_between(rounds, low, high, color=color, alpha=0.13, linewidth=0)
        marker = "o" if len(rows) == 1 else None
        axes.plot(rounds, mean, color=color, linewidth=1.8, marker=marker, label=model)
    _mark(axes, tested)
    _legend(figure, axes)
    return figure


def route_curves(curve: Mapping[int, Metrics], blocks: Sequence[str], tested: int | None = None) -> Figure | None:
    """Draw the share of decisions routed locally over the rounds, by block.

    Args:
        curve: validation metrics by round.
        blocks: names of the routed blocks.
        tested: round of the tested model, which is marked; None for no mark.
    """
    shares = {
        block: {n: value for n, m in curve.items() if (value := m.get(f"routed_local/{block}")) is not None}
        for block in blocks
    }
    if not any(shares.values()):
        return None
    figure, axes = _rounds("routed local (% of decisions)")
    for index, (block, found) in enumerate(shares.items()):
        marker = "o" if len(found) == 1 else None
        values = [100 * value for value in found.values()]
        axes.plot(list(found), values, linewidth=1.8, marker=marker, label=block, **line_style(index))
    axes.set_ylim(-3, 103)
    _mark(axes, tested)
    _legend(figure, axes)
    return figure


def _rounds(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="round", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _mark(axes: Axes, tested: int | None) -> None:
    if tested is not None:
        axes.axvline(tested, color="#555555", linewidth=1.3, linestyle=":", label="tested")


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
