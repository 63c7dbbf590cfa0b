"""The figures of a comparison: what stands in its table."""

from __future__ import annotations

from typing import NamedTuple

from flow_pl.results.runs import Comparison
from flow_pl.results.statistics import LEVEL, Spread, holm, paired_p_value, spread


class Column(NamedTuple):
    """A figure of every method.

    Attributes:
        metric: of the test.
        group: what it is of.
        label: what it is over.
        tested: model whose accuracies on clients tell whether methods differ; None where that is not asked.
        signed: whether it is a difference; then the largest is not the best: it may come of a poor model to start with.
    """

    metric: str
    group: str
    label: str
    tested: str | None = None
    signed: bool = False


def _accuracies(model: str) -> tuple[Column, ...]:
    metric = f"{model}_accuracy"
    return (
        Column(metric, model, "examples", model),
        Column(f"{metric}_client_mean", model, "clients", model),
        Column(f"{metric}_p10", model, "10th pct."),
    )


COLUMNS = (*_accuracies("generalized"), *_accuracies("personalized"), Column("gain", "gain", "examples", signed=True))


class Cell(NamedTuple):
    """A figure of one method.

    Attributes:
        value: over the seeds; None where it is not defined.
        best: whether no method has a larger mean.
        p_value: of the difference from the best, corrected; None where it was not tested.
    """

    value: Spread | None
    best: bool = False
    p_value: float | None = None

    @property
    def differs(self) -> bool:
        """Whether it differs significantly from the best."""
        return self.p_value is not None and self.p_value < LEVEL


Rows = dict[str, list[Cell]]
"""A cell for each of `COLUMNS`, by method."""


def population_rows(comparison: Comparison, population: str) -> Rows:
    """The figures of one population of clients."""
    columns = [_cells(comparison, population, column) for column in COLUMNS]
    return {method: list(cells) for method, cells in zip(comparison.methods, zip(*columns, strict=True), strict=True)}


def _cells(comparison: Comparison, population: str, column: Column) -> list[Cell]:
    values = {method: spread(comparison.values(method, population, column.metric)) for method in comparison.methods}
    known = [value.mean for value in values.values() if value is not None]
    leading = [method for method, value in values.items() if value is not None and value.mean == max(known)]
    best = [] if column.signed else leading
    p_values: dict[str, float] = {}
    if column.tested is not None and best:
        accuracies = {
            method: comparison.client_accuracies(method, population, column.tested) for method in comparison.methods
        }
        found = {m: paired_p_value(accuracies[m], accuracies[best[0]]) for m in accuracies if m not in best}
        tested = {method: p_value for method, p_value in found.items() if p_value is not None}
        p_values = dict(zip(tested, holm(list(tested.values())), strict=True))
    return [Cell(value, method in best, p_values.get(method)) for method, value in values.items()]
