"""Prints the results of a test as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from rich import get_console
from rich.table import Table

from flow_pl.callbacks._federated import federated_module
from flow_pl.callbacks._output_files import check_ending, check_writable, in_run_folder
from flow_pl.callbacks._results import Results, ResultsCallback, figures, metric_rows
from flow_pl.utils.files import write_text
from flow_pl.utils.validation import require_choice


class Row(NamedTuple):
    """Describes a row of the table: a metric, its label, and whether it is a difference."""

    metric: str
    label: str
    signed: bool = False


def _accuracy(metric: str) -> tuple[Row, ...]:
    return (
        Row(metric, "over examples"),
        Row(f"{metric}_client_mean", "mean over clients"),
        Row(f"{metric}_p10", "10th percentile of clients"),
        Row(f"{metric}_worst_decile", "worst tenth of clients"),
        Row(f"{metric}_client_std", "standard deviation of clients"),
        Row(f"{metric}_client_gini", "Gini coefficient of clients"),
        Row(f"{metric}_without_oov_eos", "without OOV and EOS"),
    )


GROUPS: dict[str, tuple[Row, ...]] = {
    "Generalized accuracy": _accuracy("generalized_accuracy"),
    "Personalized accuracy": _accuracy("personalized_accuracy"),
    "Gain of personalization": (
        Row("gain", "over examples", signed=True),
        Row("gain_client_mean", "mean over clients", signed=True),
        Row("best_mixture_accuracy", "best fixed mixture"),
        Row("gain_over_mixture", "over the best fixed mixture", signed=True),
        Row("global_or_local_accuracy", "global or local model right"),
    ),
    "Clients": (
        Row("clients_helped", "helped"),
        Row("clients_unchanged", "unchanged"),
        Row("clients_harmed", "harmed"),
    ),
    "Routed local": (Row("routed_local", "all blocks"),),
}
"""All rows, in percent; the blocks that a method routes follow the last one."""

MAIN = (
    Row("generalized_accuracy", "generalized accuracy"),
    Row("personalized_accuracy", "personalized accuracy"),
    Row("personalized_accuracy_client_mean", "  mean over clients"),
    Row("personalized_accuracy_p10", "  10th percentile of clients"),
    Row("gain", "gain of personalization", signed=True),
    Row("gain_over_mixture", "  over the best fixed mixture", signed=True),
    Row("clients_harmed", "clients harmed"),
    Row("routed_local", "routed local"),
)
"""Rows of the summary of a test."""


class ResultsTable(ResultsCallback):
    """Prints the metrics of a test at its end, with a column for each population; rows without values are omitted.

    Replaces the trainer's list of all metrics, also at the end of `validate`.

    Args:
        rows: "main" for the eight rows that summarize a test, "all" for every metric, by groups.
        path: also write every metric of the test to this file, .csv (one row per metric, one column per population)
            or .json (with digests of the data's rows and split), in the run's folder; None writes nothing.

    Raises:
        ConfigurationError: `path` has another ending; at the start of a test, it cannot be written.
    """

    def __init__(self, path: str | None = None, rows: Literal["main", "all"] = "main") -> None:
        require_choice(("main", "all"), rows=rows)
        self.rows: Literal["main", "all"] = rows
        self.path = None if path is None else check_ending(path, (".csv", ".json"))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the file before the test runs."""
        trainer.test_loop.verbose = False
        if self.path is not None and trainer.is_global_zero:
            check_writable(in_run_folder(trainer, self.path))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the trainer's own list."""
        trainer.validate_loop.verbose = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of `validate`; those of a fit are in its progress display."""
        if trainer.state.fn != "validate":
            return
        measured = figures(trainer.callback_metrics, "val/")  # in every process: reading them may be collective
        if measured and trainer.is_global_zero:
            self._print(pl_module, self.tested_round(trainer), {"validation": measured})
        self._checkpoint_round = None

    def report(self, trainer: Trainer, pl_module: LightningModule, rounds: int, results: Results) -> None:
        """Print and write the results."""
        names = self._print(pl_module, rounds, results)
        if self.path is not None:
            privacy = federated_module(pl_module).privacy
            spent = {} if privacy is None else {"privacy/epsilon": privacy.epsilon, "privacy/delta": privacy.delta}
            accuracy = federated_module(pl_module).objective.accuracy
            named = {"accuracy": accuracy} if accuracy else {}
            record = federated_module(pl_module).data_record()
            data = {} if record is None else {"data": {name: record[name] for name in ("rows", "split")}}
            run = {**names, **named, "round": rounds, **data, **spent, "results": results}
            results = {population: {**metrics, **spent} for population, metrics in results.items()}
            text = _csv(results) if self.path.suffix == ".csv" else json.dumps(run, indent=2) + "\n"
            write_text(in_run_folder(trainer, self.path), text)

    def _print(self, pl_module: LightningModule, rounds: int, results: Results) -> dict[str, str]:
        """Print the table; return its title."""
        module = federated_module(pl_module)
        names = {"method": type(module.method).__name__, "backbone": type(module.backbone).__name__}
        title = f"{names['method']} with {names['backbone']}, round {rounds}"
        blocks, privacy, objective = module.route_names, module.privacy, module.objective
        table = results_table(title, results, blocks) if self.rows == "all" else main_table(title, results)
        if objective.accuracy:
            table.caption = f"{table.caption}\naccuracy: {objective.accuracy}"
        if objective.real_valued:
            table.caption = f"{table.caption}\n{_squared_errors(results)}"
        if privacy is not None:
            table.caption = f"{table.caption}\nprivacy: epsilon {privacy.epsilon:.4g} at delta {privacy.delta:g}"
        get_console().print(table)
        return names


def _squared_errors(results: Results) -> str:
    errors = (
        f"{population} {metrics['generalized_loss']:.5g} / {metrics['personalized_loss']:.5g}"
        for population, metrics in results.items()
        if metrics.get("generalized_loss") is not None and metrics.get("personalized_loss") is not None
    )
    return f"mean squared error, generalized / personalized: {', '.join(errors)}"


def main_table(title: str, results: Results) -> Table:
    """Build the table that summarizes a test.

    Args:
        title: title of the table.
        results: for each population, its metrics by name; None if undefined.

    Returns:
        A table with a row for each available metric of `MAIN`, and a column for each population, in percent.
    """
    table = _empty(title, results)
    for row in MAIN:
        if any(row.metric in metrics for metrics in results.values()):
            table.add_row(row.label, *(percent(metrics.get(row.metric), row.signed) for metrics in results.values()))
    return table


def _empty(title: str, results: Results) -> Table:
    table = Table(title=title, caption="in percent; gains in percentage points")
    table.add_column()
    for population in results:
        table.add_column(f"{population} clients", justify="right")
    return table


def results_table(title: str, results: Results, blocks: list[str]) -> Table:
    """Build the full table of a test.

    Args:
        title: title of the table.
        results: for each population, its metrics by name; None if undefined.
        blocks: names of the routed blocks, which follow the rows of `GROUPS`.

    Returns:
        A table with a column for each population, in percent.
    """
    table = _empty(title, results)
    for group, rows in result_rows(results, blocks).items():
        table.add_section()
        table.add_row(group, style="bold")
        for label, *values in rows:
            table.add_row(f"  {label}", *values)
    return table


def result_rows(results: Results, blocks: Sequence[str]) -> dict[str, list[list[str]]]:
    """Return the rows of the test table that have values, by group.

    Args:
        results: for each population, its metrics by name; None if undefined.
        blocks: names of the routed blocks.

    Returns:
        For each group its rows: a label, and the value of each population in percent.
    """
    groups = GROUPS | {"Routed local": (*GROUPS["Routed local"], *(Row(f"routed_local/{b}", b) for b in blocks))}
    found = {
        group: [
            [row.label, *(percent(metrics.get(row.metric), row.signed) for metrics in results.values())]
            for row in rows
            if any(row.metric in metrics for metrics in results.values())
        ]
        for group, rows in groups.items()
    }
    return {group: rows for group, rows in found.items() if rows}


def percent(value: float | None, signed: bool = False) -> str:
    """Format a share in percent; a dash if undefined."""
    return "-" if value is None else f"{100 * value:{'+' if signed else ''}.2f}"


def _csv(results: Results) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", *results])
    writer.writerows(metric_rows(results))
    return text.getvalue()
