"""The results of a test, as a table that can be read."""

from __future__ import annotations

import csv
import io
import json
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich import get_console
from rich.table import Table
from torch import Tensor

from callbacks.base import metric_prefixes
from callbacks.federated import federated_data, federated_module
from callbacks.output_files import check_ending, check_writable, write_text

Results = dict[str, dict[str, float | None]]


class Row(NamedTuple):
    """A row of the table: a metric, how it is called there, and whether it is a difference."""

    metric: str
    label: str
    signed: bool = False


def _accuracy(metric: str) -> tuple[Row, ...]:
    return (
        Row(metric, "over examples"),
        Row(f"{metric}_client_mean", "mean over clients"),
        Row(f"{metric}_p10", "10th percentile of clients"),
    )


GROUPS: dict[str, tuple[Row, ...]] = {
    "Generalized accuracy": _accuracy("generalized_accuracy"),
    "Personalized accuracy": _accuracy("personalized_accuracy"),
    "Gain of personalization": (
        Row("gain", "over examples", signed=True),
        Row("gain_client_mean", "mean over clients", signed=True),
        Row("oracle_accuracy", "oracle accuracy"),
        Row("oracle_captured", "share of the oracle captured"),
    ),
    "Clients": (
        Row("clients_helped", "helped"),
        Row("clients_unchanged", "unchanged"),
        Row("clients_harmed", "harmed"),
    ),
    "Routed local": (Row("routed_local", "all blocks"),),
}
"""Rows of the table, in percent; the blocks that a method routes follow the last one."""


class ResultsTable(Callback):
    """Prints the figures of a test at its end, with a column for each population; rows without a figure are left out.

    It stands in for the list of all metrics that the trainer prints.

    Args:
        path: also write every metric of the test to this file, .csv (one row per metric, one column per population)
            or .json; None writes nothing.

    Raises:
        ConfigurationError: `path` ends otherwise; at the start of a test, it cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = None if path is None else check_ending(path, (".csv", ".json"))
        self._checkpoint_round: int | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the round of the checkpoint that is tested, which the trainer itself does not restore."""
        if trainer.testing:
            self._checkpoint_round = checkpoint["global_step"]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the file before the work is done."""
        trainer.test_loop.verbose = False
        if self.path is not None and trainer.is_global_zero:
            check_writable(self.path)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the results, in the first process."""
        metrics = trainer.callback_metrics  # in every process: reading them may be collective
        if not trainer.is_global_zero:
            return
        results: Results = {
            population: {name.removeprefix(p): _defined(value) for name, value in metrics.items() if name.startswith(p)}
            for population, p in zip(federated_data(trainer).test_populations, metric_prefixes(trainer), strict=True)
        }
        module = federated_module(pl_module)
        names = {"method": type(module.method).__name__, "backbone": type(module.backbone).__name__}
        rounds = trainer.current_epoch if self._checkpoint_round is None else self._checkpoint_round
        self._checkpoint_round = None
        title = f"{names['method']} with {names['backbone']}, round {rounds}"
        get_console().print(results_table(title, results, module.route_names))
        if self.path is not None:
            run = {**names, "round": rounds, "results": results}
            write_text(self.path, _csv(results) if self.path.suffix == ".csv" else json.dumps(run, indent=2) + "\n")


def results_table(title: str, results: Results, blocks: list[str]) -> Table:
    """The table of a test.

    Args:
        title: its title.
        results: for each population, its metrics by name; None where one is not defined.
        blocks: names of the routed blocks, which follow the rows of `GROUPS`.

    Returns:
        A table with a column for each population, in percent.
    """
    table = Table(title=title, caption="in percent; gains in percentage points")
    table.add_column()
    for population in results:
        table.add_column(f"{population} clients", justify="right")
    groups = GROUPS | {"Routed local": (*GROUPS["Routed local"], *(Row(f"routed_local/{b}", b) for b in blocks))}
    for group, rows in groups.items():
        present = [row for row in rows if any(row.metric in metrics for metrics in results.values())]
        if present:
            table.add_section()
            table.add_row(group, style="bold")
        for row in present:
            table.add_row(f"  {row.label}", *(_percent(m.get(row.metric), row.signed) for m in results.values()))
    return table


def _defined(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()


def _percent(value: float | None, signed: bool) -> str:
    return "-" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", *results])
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    writer.writerows([name, *(metrics.get(name) for metrics in results.values())] for name in names)
    return text.getvalue()
