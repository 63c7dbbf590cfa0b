"""Draw the router's decisions by block, by client and by class, and the agreement between clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flow_pl.report.agreement import Agreement
from flow_pl.report.client_figures import DASHES
from flow_pl.report.names import visible
from flow_pl.report.routes import BINS, Routes
from flow_pl.results.curves import SIZE
from flow_pl.results.plotting import COLORS, POPULATION_COLORS, grid, line_style

GLOBAL_COLOR, LOCAL_COLOR = COLORS[0], COLORS[1]

BRANCH_COLORS = LinearSegmentedColormap.from_list("branches", [GLOBAL_COLOR, "#FFFFFF", LOCAL_COLOR])
"""Colours from global through undecided to local."""

MOST_CLASSES = 30
"""Largest number of classes shown, the most frequent ones."""


def probability_histogram(routes: Mapping[str, Routes], blocks: Sequence[str]) -> Figure:
    """Draw the distribution of the probability of the local branch, by block and population.

    Args:
        routes: decisions by population.
        blocks: names of the routed blocks.
    """
    figure, panels = grid(len(blocks), 2, SIZE[0] / 2, 1.9)
    edges = np.linspace(0, 1, BINS + 1)
    for index, (axes, block) in enumerate(zip(panels, blocks, strict=True)):
        for (population, found), color in zip(routes.items(), POPULATION_COLORS, strict=False):
            heights = 100 * found.histogram[index] / max(found.decisions, 1)
            axes.stairs(heights, edges, color=color, fill=True, alpha=0.25)
            axes.stairs(heights, edges, color=color, linewidth=1.2, label=f"{population} clients")
        axes.axvline(0.5, color="#888888", linewidth=0.8, linestyle=":")
        axes.set_title(block)
        axes.set_xlim(0, 1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    figure.supxlabel("probability of the local branch", fontsize=9)
    figure.supylabel("decisions (%)", fontsize=9)
    return figure


def client_ranks(shares: Mapping[str, Sequence[Sequence[float]]], blocks: Sequence[str]) -> Figure:
    """Draw each client's share routed locally, from the least to the most local client, by block.

    Args:
        shares: for each population, the clients' shares by block.
        blocks: names of the routed blocks.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for (population, clients), dashes in zip(shares.items(), DASHES, strict=False):
        for index, block in enumerate(blocks):
            values = 100 * np.sort([client[index] for client in clients])
            color = line_style(index)["color"]
            edges = np.linspace(0, 100, len(values) + 1)
            axes.stairs(values, edges, baseline=None, color=color, linewidth=1.5, linestyle=dashes)
            axes.plot([], [], color=color, linestyle=dashes, label=f"{block}, {population}")
    axes.set(xlabel="clients, from the least to the most local (%)", ylabel="routed local (%)")
    axes.set(xlim=(0, 100), ylim=(-3, 103))
    figure.legend(loc="outside upper center", ncols=2 if len(blocks) < 3 else 3, fontsize=9)
    return figure


def by_class(routes: Routes, blocks: Sequence[str], names: Sequence[str]) -> Figure | None:
    """Draw the mean probability of the local branch by class and block, the most local class on top.

    Args:
        routes: decisions of all populations.
        blocks: names of the routed blocks.
        names: names of the classes.
    """
    common = np.argsort(-routes.class_count, kind="stable")[:MOST_CLASSES]
    common = common[routes.class_count[common] > 0]
    if not len(common):
        return None
    means = routes.class_total[common] / routes.class_count[common, None]
    order = np.argsort(-means.mean(1), kind="stable")
    means, common = means[order], common[order]
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.19 * len(common)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(100 * means, cmap=BRANCH_COLORS, vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(means):
        dark = abs(value - 0.5) > 0.27
        color = "#FFFFFF" if dark else "#222222"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    labels = [f"{visible(names[number])}   ({routes.class_count[number]})" for number in common]
    axes.set_yticks(range(len(common)), labels, fontsize=7.5, parse_math=False)
    axes.set_xticks(range(len(blocks)), list(blocks), fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_xlabel("mean probability of the local branch (%)")
    return figure


def agreement_matrix(found: Agreement) -> Figure:
    """Draw the share of equal decisions of each pair of clients on the common instances."""
    figure = Figure(figsize=(SIZE[0], 3.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * found.pairs, cmap="viridis", vmin=min(50.0, 100 * float(found.pairs.min())), vmax=100)
    figure.colorbar(image, ax=axes, label="equal decisions (%)", shrink=0.85)
    axes.grid(visible=False)
    axes.set(xlabel="clients, the least local first", ylabel="clients, the least local first", xticks=[], yticks=[])
    return figure
