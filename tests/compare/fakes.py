"""Comparisons made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flow_pl.results.runs import Client, Comparison, RunResults

Accuracies = Mapping[str, tuple[float, float]]
"""Generalized and personalized accuracy by name of a client."""


def run_results(
    method: str,
    seed: int,
    clients: Mapping[str, Accuracies],
    curve: Mapping[int, tuple[float, float]] | None = None,
    routed: Mapping[str, float] | None = None,
    split: int | None = None,
) -> RunResults:
    """A run whose clients all have ten evaluated examples, so that means over clients and examples are the same.

    Args:
        method: its name.
        seed: its seed.
        clients: by population.
        curve: generalized and personalized validation accuracy by round.
        routed: share routed local, by block.
        split: seed of its split.
    """
    populations: dict[str, dict[str, Any]] = {}
    for population, accuracies in clients.items():
        generalized, personalized = (sum(a[i] for a in accuracies.values()) / len(accuracies) for i in (0, 1))
        populations[population] = {"gain": personalized - generalized}
        for model, accuracy in (("generalized", generalized), ("personalized", personalized)):
            names = ("accuracy", "accuracy_client_mean", "accuracy_p10")
            populations[population] |= {f"{model}_{name}": accuracy for name in names}
        populations[population] |= {f"routed_local/{block}": share for block, share in (routed or {}).items()}
    rows = {
        number: {"round": number, "train_seconds": 0.5 * number, "generalized_accuracy": g, "personalized_accuracy": p}
        for number, (g, p) in (curve or {}).items()
    }
    last = max(rows, default=0)
    return RunResults(
        method=method,
        seed=seed,
        folder=Path(method),
        rounds=last,
        train_seconds=0.5 * last if rows else None,
        train_rounds=last,
        populations=populations,
        clients=[
            Client(name, population, 10 * (number + 1), *accuracies[name])
            for population, accuracies in clients.items()
            for number, name in enumerate(accuracies)
        ],
        curve=rows,
        split=split,
    )


def comparison(runs: Sequence[RunResults], **settings: Any) -> Comparison:
    """A comparison of all methods and populations of some runs."""
    methods = {run.method: [other for other in runs if other.method == run.method] for run in runs}
    defaults = {"populations": list(runs[0].populations), "seeds": len({run.seed for run in runs})}
    defaults["splits"] = len({run.split for run in runs if run.split is not None})
    return Comparison("by hand", methods, **(defaults | settings))
