"""The content of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from flow_pl.report.agreement import Agreement, agreement
from flow_pl.report.names import Kind
from flow_pl.report.routes import Routes
from flow_pl.results.runs import Client, Comparison, Metrics, RunResults


@dataclass(frozen=True)
class Evidence:
    """Everything that the report shows of a test.

    Attributes:
        method: name of the method.
        backbone: name of the backbone.
        data: name of the data module.
        rounds: training rounds of the tested model.
        blocks: names of the routed blocks; empty for a method that does not route.
        clients: clients with evaluated targets, by population.
        shares: for each of these clients, the share of decisions routed locally, by block.
        decisions: for each of these clients, the number of decisions of a block; NaN for a method that does not route.
        routes: decisions of the clients inspected instance by instance, by population; empty for a method that does
            not route.
        common: number of instances on which all inspected clients were evaluated.
        curve: validation metrics of the fit by round; empty if they were not recorded.
        kind: how an instance is shown.
        classes: names of the classes.
        tokens: names of the tokens; None if they have no names.
        names: names of the inspected clients, by client index.
        accuracy: what the task calls its accuracy.
    """

    method: str
    backbone: str
    data: str
    rounds: int
    blocks: Sequence[str]
    clients: Mapping[str, Sequence[Client]]
    shares: Mapping[str, Sequence[Sequence[float]]]
    decisions: Mapping[str, Sequence[float]]
    routes: Mapping[str, Routes]
    common: int
    curve: Mapping[int, Metrics]
    kind: Kind
    classes: Sequence[str]
    tokens: Sequence[str] | None
    names: Mapping[int, str] = field(default_factory=dict)
    accuracy: str = "accuracy"

    @cached_property
    def all_routes(self) -> Routes | None:
        """Return the decisions of all populations together; None without routes."""
        if not self.routes:
            return None
        kept = next(iter(self.routes.values())).kept
        together = Routes(len(self.blocks), len(self.classes), kept)
        together.merge(self.routes.values())
        return together if together.decisions else None

    @cached_property
    def agreement(self) -> Agreement | None:
        """Return how similar the clients' routes are; None if nothing can be compared."""
        return None if self.all_routes is None else agreement(self.all_routes.clients)

    @cached_property
    def comparison(self) -> Comparison:
        """Return the run as a comparison of one method, for the figures shared with `flow-pl compare`."""
        metrics = {
            population: {
                f"routed_local/{block}": share
                for block, share in zip(self.blocks, self._routed_local(population), strict=True)
            }
            for population in self.shares
        }
        run = RunResults(
            method=self.method,
            seed=0,
            folder=Path(),
            rounds=self.rounds,
            train_seconds=None,
            train_rounds=self.rounds,
            populations=metrics,
            clients=[client for members in self.clients.values() for client in members],
            curve=self.curve,
            accuracy=self.accuracy,
        )
        return Comparison(self.method, {self.method: [run]}, list(self.clients), seeds=1)

    def _routed_local(self, population: str) -> list[float]:
        """Return the share of all decisions of a population that are routed locally, by block."""
        made = np.array(self.decisions[population])[:, None]
        # the share of a client without decisions is NaN
        local = np.nan_to_num(np.array(self.shares[population])) * made
        return list(local.sum(0) / made.sum())
