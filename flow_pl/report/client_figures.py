"""Draw clients' gains, their accuracies from the worst to the best, and accuracy by client size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from flow_pl.report.routes import Floats
from flow_pl.results.curves import MODEL_COLORS, SIZE
from flow_pl.results.plotting import POPULATION_COLORS
from flow_pl.results.runs import Client

Clients = Mapping[str, Sequence[Client]]
"""Clients by population."""

GROUPS = 5
"""Largest number of groups of clients by size."""

DASHES = ("-", (0, (4, 2)), (0, (1, 1.2)))
"""Line styles of the populations in figures where colours denote the models."""


def gain_histogram(clients: Clients) -> Figure:
    """Draw the distribution of clients' gains (personalized - generalized accuracy), in percentage points.

    Clients whose gain is undefined or infinite, since a model diverged, are left out and counted in the legend.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    gains = {population: _gains(members) for population, members in clients.items()}
    diverged = {population: int((~np.isfinite(gain)).sum()) for population, gain in gains.items()}
    gains = {population: gain[np.isfinite(gain)] for population, gain in gains.items()}
    largest = max([1.0, *(float(np.abs(gain).max()) for gain in gains.values() if gain.size)])
    width = _round_width(2 * largest / 20)
    # zero is in the middle of a bin: an unchanged client is neither helped nor harmed
    half = np.ceil(largest / width - 0.5)
    edges = width * (np.arange(-half, half + 2) - 0.5)
    weights = [np.full(len(gain), 100 / max(len(gain), 1)) for gain in gains.values()]
    colors = POPULATION_COLORS[: len(gains)]
    labels = [_gain_label(population, gain, diverged[population]) for population, gain in gains.items()]
    axes.hist(list(gains.values()), bins=edges.tolist(), weights=weights, color=colors, label=labels)
    axes.axvline(0, color="#444444", linewidth=0.9)
    axes.set(xlabel="gain of a client (percentage points)", ylabel="clients (%)")
    figure.legend(loc="outside upper center", ncols=3, fontsize=9)
    return figure


def accuracy_ranks(clients: Clients, accuracy: str = "accuracy") -> Figure:
    """Draw the accuracies of both models from the worst client to the best; the worst tenth is shaded."""
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, 10, color="#F2D9CC", linewidth=0)
    for (population, members), dashes in zip(clients.items(), DASHES, strict=False):
        for model, color in MODEL_COLORS.items():
            values = np.array([100 * getattr(client, model) for client in members])
            values = values[np.argsort(np.where(np.isnan(values), -np.inf, values))]  # none is worse than undefined
            # each client is one step of equal width, so that the shaded tenth holds a tenth of the clients
            edges = np.linspace(0, 100, len(values) + 1)
            axes.stairs(values, edges, baseline=None, color=color, linewidth=1.5, linestyle=dashes)
            axes.plot([], [], color=color, linestyle=dashes, label=f"{model}, {population}")
    axes.set(xlabel="clients, from the worst to the best (%)", ylabel=f"{accuracy} (%)", xlim=(0, 100))
    axes.text(5, 0.98, "worst\ntenth", transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=7)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    return figure


def accuracy_by_size(clients: Clients, accuracy: str = "accuracy") -> Figure:
    """Draw accuracy by clients' number of training examples: mean and quartiles of up to `GROUPS` groups."""
    members = sorted((client for group in clients.values() for client in group), key=lambda client: client.examples)
    groups = size_groups([client.examples for client in members])
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    for shift, (model, color) in zip((-0.12, 0.12), MODEL_COLORS.items(), strict=True):
        values = [[100 * getattr(members[i], model) for i in group] for group in groups]
        means = np.array([np.mean(group) for group in values])
        quartiles = np.array([np.quantile(group, (0.25, 0.75)) for group in values]).T
        places = np.arange(len(groups)) + shift
        axes.vlines(places, *quartiles, color=color, linewidth=5, alpha=0.25)
        axes.plot(places, means, color=color, marker="o", markersize=5, linewidth=1.2, label=model)
    spans = [(members[group[0]].examples, members[group[-1]].examples) for group in groups]
    texts = [f"{a}" if a == b else f"{a} to {b}" for a, b in spans]
    labels = [f"{text}\nn = {len(group)}" for text, group in zip(texts, groups, strict=True)]
    axes.set_xticks(range(len(groups)), labels, fontsize=9)
    axes.set(xlabel="training examples of a client", ylabel=f"{accuracy} (%)", xlim=(-0.5, len(groups) - 0.5))
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    return figure


def size_groups(sizes: Sequence[int]) -> list[list[int]]:
    """Group the indices of ascending sizes into similarly large groups; equal sizes share a group.

    Args:
        sizes: the sizes in ascending order, at least one.
    """
    bounds = np.quantile(sizes, np.linspace(0, 1, GROUPS + 1)[1:-1])
    group_of = np.searchsorted(bounds, sizes, side="left")
    return [np.flatnonzero(group_of == group).tolist() for group in np.unique(group_of)]


def _gain_label(population: str, gains: Floats, diverged: int) -> str:
    mean = f"mean {gains.mean():+.1f}" if gains.size else "no mean"
    return f"{population}: {mean}" + (f" ({diverged} diverged)" if diverged else "")


def _gains(clients: Sequence[Client]) -> Floats:
    # rounded: accuracies that are equal in exact arithmetic may differ in the last digit
    return np.round([100 * (client.personalized - client.generalized) for client in clients], 9)


def _round_width(width: float) -> float:
    """Round up to the next of 1, 2, 5, 10, ... and their tenths."""
    scale = 10 ** np.floor(np.log10(width))
    return float(next(step * scale for step in (1, 2, 5, 10) if step * scale >= width))
