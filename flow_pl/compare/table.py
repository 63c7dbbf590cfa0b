"""Compute the values in the table of a comparison."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import numpy as np

from flow_pl.results.runs import Comparison
from flow_pl.results.statistics import LEVEL, Spread, holm, sign_flip_p_values, spread


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        metric: name of the test metric.
        group: first line of the heading: the model, or the gain.
        label: second line of the heading: what the metric is computed over.
        tested: the model whose accuracies on clients are tested for a difference; None for no test.
        over_clients: whether the metric is a mean over clients rather than over their examples.
        signed: whether the metric is a difference; then the largest is not the best, since it may result from a poor
            generalized model.
    """

    metric: str
    group: str
    label: str
    tested: str | None = None
    over_clients: bool = False
    signed: bool = False


def _accuracies(model: str) -> tuple[Column, ...]:
    metric = f"{model}_accuracy"
    return (
        Column(metric, model, "examples", model),
        Column(f"{metric}_client_mean", model, "clients", model, over_clients=True),
        Column(f"{metric}_p10", model, "10th pct."),
    )


COLUMNS = (*_accuracies("generalized"), *_accuracies("personalized"), Column("gain", "gain", "examples", signed=True))


class Cell(NamedTuple):
    """A value of one method.

    Attributes:
        value: mean and deviation over the runs; None if undefined.
        best: whether this is the only largest mean of the column.
        p_value: corrected p-value of the difference from the reference; None if not tested.
        tied: whether several methods share the largest mean.
    """

    value: Spread | None
    best: bool = False
    p_value: float | None = None
    tied: bool = False

    @property
    def differs(self) -> bool:
        """Return whether the method differs significantly from the reference."""
        return self.p_value is not None and self.p_value < LEVEL


Rows = dict[str, list[Cell]]
"""For each method, one cell per column of `COLUMNS`."""


def population_rows(comparison: Comparison, population: str) -> Rows:
    """Return the table's cells for one population of clients."""
    columns = [_cells(comparison, population, column) for column in COLUMNS]
    return {method: list(cells) for method, cells in zip(comparison.methods, zip(*columns, strict=True), strict=True)}


def equalities(comparison: Comparison) -> list[str]:
    """List the accuracies that are equal on every client shown, in every run, because the models are the same."""
    generalized: dict[object, list[str]] = {}
    plain = []
    for method, runs in comparison.methods.items():
        clients = [(run, c) for run in runs for c in run.clients if c.population in comparison.populations]
        if not clients:
            continue
        of_w_g = frozenset((run.split, run.seed, c.population, c.name, c.generalized) for run, c in clients)
        generalized.setdefault(of_w_g, []).append(method)
        if all(c.generalized == c.personalized for _, c in clients):
            plain.append(method)
    found = [
        f"Equal on every client: the generalized accuracy of {', '.join(names)}."
        for names in generalized.values()
        if len(names) > 1
    ]
    if plain:
        found.append(f"No personal model (personalized = generalized on every client): {', '.join(plain)}.")
    return found


def undefined(comparison: Comparison) -> list[str]:
    """List the accuracies that some runs lack although they evaluated clients: a model predicted NaN."""
    found = []
    for method, runs in comparison.methods.items():
        for population in comparison.populations:
            made = sum(any(client.population == population for client in run.clients) for run in runs)
            for model in ("generalized", "personalized"):
                left_out = made - len(comparison.values(method, population, f"{model}_accuracy"))
                if left_out > 0:
                    found.append(
                        f"{method} diverged in {left_out} of {made} runs: their {model} accuracy on {population} "
                        "clients is undefined, and left out of the mean."
                    )
    return found


def _cells(comparison: Comparison, population: str, column: Column) -> list[Cell]:
    values = {method: spread(comparison.values(method, population, column.metric)) for method in comparison.methods}
    known = [value.mean for value in values.values() if value is not None]
    # means that are equal in exact arithmetic may differ in the last digit
    leading = [method for method, value in values.items() if value is not None and value.mean > max(known) - 1e-12]
    best = [] if column.signed else leading
    p_values: dict[str, float] = {}
    reference = comparison.reference or next(iter(best), None)
    if column.tested is not None and reference is not None and reference in comparison.methods:
        p_values = _p_values(comparison, population, column, reference)
    alone = len(best) == 1
    return [
        Cell(value, method in best and alone, p_values.get(method), method in best and not alone)
        for method, value in values.items()
    ]


def _p_values(comparison: Comparison, population: str, column: Column, reference: str) -> dict[str, float]:
    """Test each method's difference from the reference, unless it is undefined or they are equal on every client."""
    assert column.tested is not None
    found = {}
    for method in comparison.methods:
        added = comparison.client_differences(method, reference, population, column.tested, column.over_clients)
        if all(map(isfinite, added.values())) and any(abs(value) > 1e-12 for value in added.values()):
            found[method] = added
    clients = list(dict.fromkeys(name for added in found.values() for name in added))
    differences = np.array([[added.get(name, 0.0) for added in found.values()] for name in clients])
    return dict(zip(found, holm(sign_flip_p_values(differences)), strict=True)) if found else {}
