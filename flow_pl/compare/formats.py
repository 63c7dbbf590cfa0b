"""Format the table of a comparison for the terminal, as Markdown and as CSV: one row per method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flow_pl.compare.table import COLUMNS, Cell, Column, Rows, equalities, population_rows, undefined
from flow_pl.results.runs import Comparison, RunResults
from flow_pl.results.statistics import LEVEL, Spread, spread
from flow_pl.utils.files import csv_text

MARK = "†"
"""Follows a value that differs significantly from the reference."""

TIED = "="
"""Follows a value that ties for the best of its column."""


def caption(comparison: Comparison) -> list[str]:
    """Return the sentences that explain the tables."""
    over = f"mean ± standard deviation over {comparison.over}" if comparison.repeats > 1 else "one seed"
    return [
        f"Test {comparison.accuracy} in percent, gain (personalized - generalized) in percentage points; {over}.",
        "Each over all held-out examples, as the mean over clients, and as the 10th percentile over clients.",
        f"Bold: the best value of its column; {TIED}: several methods share it.",
        *undefined(comparison),
        *equalities(comparison),
        *_test_caption(comparison),
        "Train time covers all rounds, without evaluation and the personalization in it.",
        *(
            ["Own budget: epochs, steps and learning rates that are not common to all methods."]
            if _has_budgets(comparison)
            else []
        ),
        *comparison.notes,
    ]


def _test_caption(comparison: Comparison) -> list[str]:
    """Explain the mark; nothing if there is only one method."""
    comparisons = len(comparison.methods) - 1
    if not comparisons:
        return []
    if comparison.reference is None:
        against = "the best of its column, as no --reference was given"
    elif comparison.reference in comparison.methods:
        against = f"the reference, {comparison.reference}"
    else:
        return [f"Nothing is tested: the reference, {comparison.reference}, has no results."]
    within = " within each run" if comparison.repeats > 1 else ""
    # a method that equals the reference on every client is neither tested nor counted
    corrected = f", with Holm's correction for up to {comparisons} comparisons in a column" if comparisons > 1 else ""
    return [
        f"{MARK}: differs significantly from {against}: p < {LEVEL} in a randomization test of the difference that "
        f"the column shows, which pairs the two methods on each client{within} and flips the signs of "
        f"clients{corrected}."
    ]


def rich_tables(comparison: Comparison, console: Console) -> Iterable[Table]:
    """Yield a table for each population, in two parts if the terminal is too narrow."""
    for population in comparison.populations:
        rows, title = population_rows(comparison, population), _title(comparison, population)
        whole = _rich_table(comparison, rows, title, COLUMNS)
        # by default a console measures no wider than its own width
        if console.measure(whole, options=console.options.update_width(1000)).maximum <= console.width:
            yield whole
        else:
            for groups in (("generalized",), ("personalized", "gain")):
                columns = [column for column in COLUMNS if column.group in groups]
                yield _rich_table(comparison, rows, f"{title}, {groups[0]}", columns)


def _rich_table(comparison: Comparison, rows: Rows, title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("method")
    for column in columns:
        table.add_column(f"{column.group}\n{column.label}", justify="right")
    timed = COLUMNS[-1] in columns
    if timed:
        table.add_column("train\ntime", justify="right")
    # if the table is in two parts, this goes into the first, which is narrower
    budget = COLUMNS[0] in columns and _has_budgets(comparison)
    if budget:
        table.add_column("own\nbudget")
    for method, cells in rows.items():
        shown = [(cell, column) for cell, column in zip(cells, COLUMNS, strict=True) if column in columns]
        texts = [Text(_text(cell, column), "bold" if cell.best else "") for cell, column in shown]
        ends = [_train_time(comparison.methods[method])] if timed else []
        ends += [(comparison.budgets.get(method) or "-").replace(", ", "\n")] if budget else []
        table.add_row(method, *texts, *ends)
    return table


def markdown(comparison: Comparison) -> str:
    """Format a comparison as Markdown."""
    lines = [f"# Comparison: {comparison.name}", ""]
    header = ["method", *(f"{column.group}, {column.label}" for column in COLUMNS), "train time"]
    header += ["own budget"] * _has_budgets(comparison)
    for population in comparison.populations:
        lines += [
            f"## {_title(comparison, population)}",
            "",
            _line(header),
            _line(["---", *["---:"] * len(header[1:])]),
        ]
        for method, cells in population_rows(comparison, population).items():
            texts = [_text(cell, column) for cell, column in zip(cells, COLUMNS, strict=True)]
            texts = [f"**{text}**" if cell.best else text for text, cell in zip(texts, cells, strict=True)]
            ends = [_train_time(comparison.methods[method])]
            ends += [comparison.budgets.get(method) or "-"] * _has_budgets(comparison)
            lines.append(_line([method, *texts, *ends]))
        lines.append("")
    return "\n".join([*lines, *(f"- {sentence}" for sentence in caption(comparison))]) + "\n"


def method_csv(comparison: Comparison) -> str:
    """Format one row per method as CSV: mean, standard deviation and p-value of each column, as fractions."""
    rows = []
    tables = {population: population_rows(comparison, population) for population in comparison.populations}
    for method, runs in comparison.methods.items():
        row: dict[str, object] = {"method": method, "seeds": len({run.seed for run in runs})}
        row |= {"splits": len({run.split for run in runs})} if comparison.splits else {}
        row["reference"] = comparison.reference
        for population, table in tables.items():
            for column, cell in zip(COLUMNS, table[method], strict=True):
                name = f"{population}/{column.metric}"
                row[name], row[f"{name}_std"] = cell.value or (None, None)
                if column.tested is not None:
                    row[f"{name}_p"] = cell.p_value
        row |= {"own_budget": comparison.budgets.get(method)} if _has_budgets(comparison) else {}
        rows.append(row | {name: value and value.mean for name, value in _speed(runs).items()})
    return csv_text(rows)


def run_csv(comparison: Comparison) -> str:
    """Format one row per run as CSV: every metric of its test."""
    rows = []
    for runs in comparison.methods.values():
        for run in runs:
            row: dict[str, object] = {"method": run.method}
            row |= {"split": run.split} if comparison.splits else {}
            row |= {"seed": run.seed, "rounds": run.rounds}
            row |= {name: value and value.mean for name, value in _speed([run]).items()}
            for population in comparison.populations:
                row |= {f"{population}/{name}": value for name, value in run.populations.get(population, {}).items()}
            rows.append(row)
    return csv_text(rows)


def _has_budgets(comparison: Comparison) -> bool:
    return any(comparison.budgets.get(method) for method in comparison.methods)


def _title(comparison: Comparison, population: str) -> str:
    clients = {c.name for runs in comparison.methods.values() for c in runs[0].clients if c.population == population}
    return f"{population} clients ({len(clients)})"


def _text(cell: Cell, column: Column) -> str:
    if cell.value is None:
        return "-"
    deviation = "" if cell.value.deviation is None else f" ±{100 * cell.value.deviation:.2f}"
    return f"{100 * cell.value.mean:{'+' if column.signed else ''}.2f}{deviation}{MARK if cell.differs else ''}" + (
        f" {TIED}" if cell.tied else ""
    )


def _speed(runs: Sequence[RunResults]) -> dict[str, Spread | None]:
    timed = [(run.train_seconds, run.train_rounds) for run in runs if run.train_seconds]
    return {
        "train_seconds": spread([seconds for seconds, _ in timed]),
        "rounds_per_second": spread([rounds / seconds for seconds, rounds in timed]),
    }


def _train_time(runs: Sequence[RunResults]) -> str:
    seconds = _speed(runs)["train_seconds"]
    return "-" if seconds is None else f"{seconds.mean:.1f} s"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
