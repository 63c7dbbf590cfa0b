"""Read the results of the runs of a comparison from their folders."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

Metrics = Mapping[str, float | None]
"""Metric values by name; None if undefined."""


class Client(NamedTuple):
    """A client in the test of a run.

    Attributes:
        name: name of the client.
        population: seen or new.
        examples: number of training examples.
        generalized: accuracy of w_g.
        personalized: accuracy of the client's own model.
        evaluated: number of held-out targets of both accuracies, the client's weight in a mean over examples.
    """

    name: str
    population: str
    examples: int
    generalized: float
    personalized: float
    evaluated: int = 1


@dataclass(frozen=True)
class RunResults:
    """Results of one run.

    Attributes:
        method: name of the method.
        seed: seed of the run.
        folder: folder of the run.
        rounds: training rounds of the tested model.
        train_seconds: training time, without validation; None if unknown.
        train_rounds: rounds trained in that time.
        populations: test metrics by population.
        clients: clients with evaluated targets.
        curve: validation metrics by round.
        split: seed of the federation's split, if the comparison repeats over splits.
        accuracy: what the task calls its accuracy; empty if it is the share of correct predictions.
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
    split: int | None = None
    accuracy: str = ""


@dataclass(frozen=True)
class Comparison:
    """Results of a comparison.

    Attributes:
        name: name of the comparison.
        methods: the finished runs of each method, in the order of splits and seeds; methods in the order given.
        populations: client populations to show.
        seeds: number of seeds of each method and split.
        notes: remarks for the reader.
        budgets: the part of each method's budget that is not common to all; empty or absent if there is none.
        splits: number of splits of the federation; 0 for the task's split only.
        reference: the method that the others are tested against; None for the best of each column.
    """

    name: str
    methods: Mapping[str, Sequence[RunResults]]
    populations: Sequence[str]
    seeds: int
    notes: Sequence[str] = ()
    budgets: Mapping[str, str] = field(default_factory=dict)
    splits: int = 0
    reference: str | None = None

    @property
    def repeats(self) -> int:
        """Number of runs per method."""
        return self.seeds * max(self.splits, 1)

    @property
    def accuracy(self) -> str:
        """Name of the accuracy: of the task's own, or just accuracy."""
        named = (run.accuracy for runs in self.methods.values() for run in runs if run.accuracy)
        return next(named, "accuracy")

    @property
    def over(self) -> str:
        """Describe the runs that a mean is over."""
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        if not self.splits:
            return seeds
        return f"{self.splits} split{'s' if self.splits > 1 else ''} x {seeds}"

    def values(self, method: str, population: str, metric: str) -> list[float]:
        """Return a test metric of each run for which it is defined and finite."""
        found = (run.populations.get(population, {}).get(metric) for run in self.methods[method])
        return [value for value in found if value is not None and isfinite(value)]

    def client_accuracies(self, method: str, population: str, model: str) -> dict[str, float]:
        """Return each client's accuracy, averaged over the seeds; with several splits, a client counts once per split.

        Args:
            method: name of the method.
            population: population of the clients.
            model: "generalized" or "personalized".
        """
        found: dict[str, list[float]] = {}
        for run in self.methods[method]:
            for client in run.clients:
                if client.population == population:
                    found.setdefault(client_key(run, client), []).append(getattr(client, model))
        return {name: fmean(values) for name, values in found.items()}

    def client_differences(
        self, method: str, other: str, population: str, model: str, over_clients: bool
    ) -> dict[str, float]:
        """Return each client's contribution to the difference of two methods in an accuracy; the sum is the difference.

        Clients are paired within each run (split and seed) that both methods have.

        Args:
            method: name of the method.
            other: name of the method to subtract.
            population: population of the clients.
            model: "generalized" or "personalized".
            over_clients: whether the accuracy is a mean over clients rather than over their examples.
        """
        others = {(run.split, run.seed): run for run in self.methods[other]}
        pairs = [(run, others[run.split, run.seed]) for run in self.methods[method] if (run.split, run.seed) in others]
        found: dict[str, float] = {}
        for run, paired in pairs:
            theirs = {c.name: getattr(c, model) for c in paired.clients if c.population == population}
            clients = [c for c in run.clients if c.population == population and c.name in theirs]
            weights = [1 if over_clients else c.evaluated for c in clients]
            for client, weight in zip(clients, weights, strict=True):
                share = weight / sum(weights) / len(pairs)
                added = share * (getattr(client, model) - theirs[client.name])
                found[client.name] = found.get(client.name, 0.0) + added
        return found

    def curves(self, method: str, metric: str) -> dict[int, list[float]]:
        """Return a validation metric of all runs, by round."""
        found: dict[int, list[float]] = {}
        for run in self.methods[method]:
            for number, metrics in run.curve.items():
                value = metrics.get(metric)
                if value is not None and isfinite(value):
                    found.setdefault(number, []).append(value)
        return dict(sorted(found.items()))


def client_key(run: RunResults, client: Client) -> str:
    """Return a name for a client within a run's split, since every split holds out other examples."""
    return client.name if run.split is None else f"{client.name}, split {run.split}"


def read_curve(path: Path) -> dict[int, Metrics]:
    """Read the validation metrics of a fit, by round; empty if there is no file, as for a run without rounds.

    Args:
        path: the file that the callback `LearningCurves` wrote.
    """
    rows = read_table(path) if path.exists() else []
    return {int(row["round"]): {name: _number(text) for name, text in row.items()} for row in rows}


def read_log(folder: Path) -> dict[int, Metrics]:
    """Read the validation metrics of a run's last fit, by round, from its CSV log; empty if there is no such log.

    Args:
        folder: the log folder, with a `version_<n>` for each command of the run.
    """
    versions = [path for path in folder.glob("version_*/metrics.csv") if path.parent.name[8:].isdecimal()]
    for path in sorted(versions, key=lambda path: int(path.parent.name[8:]), reverse=True):
        rows = read_table(path)
        if rows and any(name.startswith("train/") for name in rows[0]):  # from a fit, not from a test
            # a round has one row for training and one for validation
            measured = ((int(row["step"]), _validation(row)) for row in rows)
            return {round_: metrics for round_, metrics in measured if metrics}
    return {}


def _validation(row: Mapping[str, str]) -> Metrics:
    """Return the validation metrics in a row of the log, by name without prefix."""
    prefix = "val/"
    return {name.removeprefix(prefix): _number(text) for name, text in row.items() if text and name.startswith(prefix)}


def _number(text: str) -> float | None:
    """Return a metric; None if it was not measured or is undefined."""
    return None if text in ("", "nan") else float(text)


def read_table(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
