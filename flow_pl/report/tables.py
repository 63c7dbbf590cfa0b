"""Build the tables of the report, for its page and for loggers."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import numpy as np

from flow_pl.report.evidence import Evidence
from flow_pl.results.runs import Client

Value = str | int | float | None

WORST = 15
"""Largest number of clients in the list of the worst."""


class Table(NamedTuple):
    """Columns and rows of values; shares are fractions, undefined values are None."""

    columns: list[str]
    rows: list[list[Value]]


def client_table(evidence: Evidence) -> Table:
    """Return one row per client, by population."""
    columns = ["client", "population", "examples", "w_g", "own model", "gain"]
    columns += [f"local: {block}" for block in evidence.blocks]
    rows = [
        [*_client(client), *map(float, share)]
        for population, clients in evidence.clients.items()
        for client, share in zip(clients, evidence.shares[population], strict=True)
    ]
    return Table(columns, rows)


def worst_clients(evidence: Evidence) -> Table:
    """Return the tenth of clients with the least accurate own models; at least three if there are as many."""
    table = client_table(evidence)
    wanted = min(max(3, -(-len(table.rows) // 10)), WORST)
    personalized = table.columns.index("own model")
    # a model without a defined accuracy has diverged: none is worse
    worst_first = sorted(table.rows, key=lambda row: -inf if row[personalized] is None else row[personalized])  # type: ignore[arg-type,return-value]
    return table._replace(rows=worst_first[:wanted])


def block_table(evidence: Evidence) -> Table:
    """Return one row per routed block: its decisions, their entropy, and the agreement between clients."""
    columns = ["block", "mean probability local", "routed local", "entropy of a decision (bits)"]
    columns += ["explained by the client (bits)", "explained by the instance (bits)"]
    routes, found = evidence.all_routes, evidence.agreement
    if routes is None:
        return Table(columns, [])
    values = [routes.mean, routes.share, routes.decision_entropy, *routes.explained]
    if found is not None:
        columns += ["agreement, pairs of clients", "agreement by chance", "beyond chance", "distance of probabilities"]
        values += [found.same, found.chance, found.beyond_chance, found.difference]
    rows = [[block, *(_defined(value[i]) for value in values)] for i, block in enumerate(evidence.blocks)]
    return Table(columns, rows)


def class_table(evidence: Evidence) -> Table:
    """Return one row per class that occurs: its decisions, and by block their mean probability of the local branch."""
    routes = evidence.all_routes
    columns = ["class", "decisions", *evidence.blocks]
    if routes is None:
        return Table(columns, [])
    present = np.flatnonzero(routes.class_count)
    means = routes.class_total[present] / routes.class_count[present, None]
    rows: list[list[Value]] = [
        [evidence.classes[number], int(routes.class_count[number]), *mean]
        for number, mean in zip(present.tolist(), means.tolist(), strict=True)
    ]
    return Table(columns, rows)


def _client(client: Client) -> list[Value]:
    accuracies = client.generalized, client.personalized, client.personalized - client.generalized
    return [client.name, client.population, client.examples, *map(_defined, accuracies)]


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
