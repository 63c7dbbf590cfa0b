"""What the runs of a comparison measured, read from their folders."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

Metrics = Mapping[str, float | None]
"""Figures by name; None where one is not defined."""


class Client(NamedTuple):
    """A client in the test of a run.

    Attributes:
        name: of the client.
        population: seen or new.
        examples: number of training examples.
        generalized: accuracy of w_g.
        personalized: accuracy of the client's own model.
    """

    name: str
    population: str
    examples: int
    generalized: float
    personalized: float


@dataclass(frozen=True)
class RunResults:
    """What one run measured.

    Attributes:
        method: name of the method.
        seed: of the run.
        folder: of the run.
        rounds: of the model that was tested.
        train_seconds: time in training, without validation; None where it is not known.
        train_rounds: rounds made in that time.
        populations: metrics of the test by population.
        clients: those with evaluated targets.
        curve: metrics of the validations, by round.
    """

    method: str
    seed: int
    folder: Path
    rounds: int
    train_seconds: float | None
    train_rounds: int
    populations: Mapping[str, Metrics]
    clients: Sequence[Client]
    curve: Mapping[int, Metrics]


@dataclass(frozen=True)
class Comparison:
    """All that was measured.

    Attributes:
        name: of the comparison.
        methods: the runs that are done, in the order of the seeds, by method, in the order of the configurations.
        populations: which clients are shown.
        seeds: how many a method ought to have.
        notes: what a reader has to know.
        budgets: what each method trains with that not all of them do; empty texts, or none, where that is nothing.
    """

    name: str
    methods: Mapping[str, Sequence[RunResults]]
    populations: Sequence[str]
    seeds: int
    notes: Sequence[str] = ()
    budgets: Mapping[str, str] = field(default_factory=dict)

    def values(self, method: str, population: str, metric: str) -> list[float]:
        """A metric of the test, of each seed for which it is defined."""
        found = (run.populations.get(population, {}).get(metric) for run in self.methods[method])
        return [value for value in found if value is not None]

    def client_accuracies(self, method: str, population: str, model: str) -> dict[str, float]:
        """Each client's accuracy, averaged over the seeds.

        Args:
            method: name of the method.
            population: which clients.
            model: "generalized" or "personalized".
        """
        found: dict[str, list[float]] = {}
        for run in self.methods[method]:
            for client in run.clients:
                if client.population == population:
                    found.setdefault(client.name, []).append(getattr(client, model))
        return {name: fmean(values) for name, values in found.items()}

    def curves(self, method: str, metric: str) -> dict[int, list[float]]:
        """A metric of the validations, of each seed, by round."""
        found: dict[int, list[float]] = {}
        for run in self.methods[method]:
            for number, metrics in run.curve.items():
                value = metrics.get(metric)
                if value is not None:
                    found.setdefault(number, []).append(value)
        return dict(sorted(found.items()))


def read_curve(path: Path) -> dict[int, Metrics]:
    """The metrics of the validations of a fit, by round; none where there is no file, as of a run without a round.

    Args:
        path: the file that the callback `LearningCurves` wrote.
    """
    rows = read_table(path) if path.exists() else []
    return {int(row["round"]): {name: float(text) if text else None for name, text in row.items()} for row in rows}


def read_log(folder: Path) -> dict[int, Metrics]:
    """The metrics of the validations of a run's last fit, by round, from its CSV log; none where there is no such log.

    Args:
        folder: the one with a `version_<n>` for each command of the run.
    """
    versions = [path for path in folder.glob("version_*/metrics.csv") if path.parent.name[8:].isdecimal()]
    for path in sorted(versions, key=lambda path: int(path.parent.name[8:]), reverse=True):
        rows = read_table(path)
        if rows and any(name.startswith("train/") for name in rows[0]):  # of a fit, not of a test
            # a round has a row of its training and one of its validation
            measured = ((int(row["step"]), _validation(row)) for row in rows)
            return {round_: metrics for round_, metrics in measured if metrics}
    return {}


def _validation(row: Mapping[str, str]) -> Metrics:
    """The metrics of a validation in a row of the log, by their names without their prefix."""
    prefix = "val/"
    return {name.removeprefix(prefix): float(text) for name, text in row.items() if text and name.startswith(prefix)}


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
