"""The figure of `ConvergenceDiagnostics`: the quantities that the theory bounds, over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flow_pl.results.plotting import COLORS, line_style, save

Rows = Sequence[Mapping[str, float]]

GRADIENTS = {
    "gradient_norm": r"$\|\nabla F(w_g)\|^2$",
    "sample_gradient_norm": r"the same of the sample, not corrected",
    "client_gradient_norm": r"mean of $\|\nabla f_m(w_g)\|^2$",
    "gradient_diversity": "gradient diversity",
}

PROGRESS = {
    "global_progress": r"client's copy of $w_g$: $\|w_{g,m} - w_g\|$",
    "local_progress": r"local model: $\|w_\ell - w_g\|$",
    "deviation": r"personalized model: $\|w_p - w_g\|$",
}

BLOCK = "q_local/"


def draw(rows: Rows, path: Path) -> None:
    """Draw the measurements of a run into a PNG file.

    Args:
        rows: values of `ConvergenceDiagnostics` by name; at least one row.
        path: path of the file.
    """
    save(partial(_figure, rows), path)


def _figure(rows: Rows) -> Figure:
    blocks = [name for name in rows[-1] if name.startswith(BLOCK)]
    panels = 4 if blocks else 3
    figure = Figure(figsize=(4.6 * 2, 3.2 * 2) if blocks else (4.3 * 3, 3.4), layout="constrained")
    axes = list(np.ravel(figure.subplots(2 if blocks else 1, -(-panels // (2 if blocks else 1)))))
    # the diversity is already a square
    _curves(axes[0], rows, GRADIENTS, squared=("gradient_norm", "sample_gradient_norm", "client_gradient_norm"))
    axes[0].set(title="Gradients on a sample of clients", xlabel="round", yscale="log")
    _curves(axes[1], rows, PROGRESS)
    axes[1].set(title="How far the clients of a round come", xlabel="round", ylim=(0, None))
    _dissimilarity(axes[2], rows)
    if blocks:
        _curves(axes[3], rows, {"q_local": "all blocks", **{name: name.removeprefix(BLOCK) for name in blocks}})
        axes[3].set(title=r"Routing: mean probability $q_{local}$", xlabel="round", ylim=(0, 1))
    return figure


def _curves(axes: Axes, rows: Rows, names: Mapping[str, str], squared: Sequence[str] = ()) -> None:
    rounds = [row["round"] for row in rows]
    for index, (name, label) in enumerate(names.items()):
        if name in rows[-1]:
            values = np.array([row.get(name, np.nan) for row in rows]) ** (2 if name in squared else 1)
            marker = "o" if len(rows) == 1 else None
            axes.plot(rounds, np.where(values > 0, values, np.nan), label=label, marker=marker, **line_style(index))
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)


def _dissimilarity(axes: Axes, rows: Rows) -> None:
    x, y = (np.array([row[name] for row in rows]) ** 2 for name in ("gradient_norm", "client_gradient_norm"))
    bound_g, bound_b = rows[-1]["G"], rows[-1]["B"]
    line = np.array([0, 1.05 * max(x.max(), 1e-12)])
    label = f"$G^2 + B^2\\,\\|\\nabla F\\|^2$:  G = {bound_g:.3g}, B = {bound_b:.3g}"
    axes.plot(line, bound_g**2 + bound_b**2 * line, color=COLORS[1], linewidth=1.2, label=label)
    axes.scatter(x, y, s=16, color=COLORS[0], label="rounds measured", zorder=3)
    axes.set(title="(G, B)-dissimilarity", xlabel=GRADIENTS["gradient_norm"], ylabel=GRADIENTS["client_gradient_norm"])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
