"""Format what `flow-pl tune` tried: one row for each setting of a method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from flow_pl.compare.tuning import Search, Trial, accuracy, shown
from flow_pl.utils.files import csv_text

CAPTION = (
    "Personalized accuracy in percent on validation examples of seen clients after the last round, over examples; "
    "mean over splits and seeds. Each setting was tried with the best values of those above it. Bold: chosen; "
    "-: a run failed."
)


def markdown(searches: Sequence[Search]) -> str:
    """Return the table as Markdown."""
    lines = [CAPTION, "", "| method | setting | tried: accuracy |", "|---|---|---|"]
    for search, trials in _rows(searches):
        best = search.best.get(trials[0].setting)
        cells = (f"**{_cell(trial)}**" if trial.value == best else _cell(trial) for trial in trials)
        lines.append(f"| `{search.method}` | `{trials[0].setting}` | {', '.join(cells)} |")
    return "\n".join([*lines, "", *_at_an_end(searches), ""])


def rich_table(searches: Sequence[Search]) -> Table:
    """Return the table for the terminal."""
    caption = " ".join([CAPTION, *_at_an_end(searches)])
    table = Table("method", "setting", "tried: accuracy", box=box.SIMPLE_HEAD, caption=caption, caption_justify="left")
    for search, trials in _rows(searches):
        best = search.best.get(trials[0].setting)
        cells = [Text(_cell(trial), "bold" if trial.value == best else "") for trial in trials]
        table.add_row(search.method, trials[0].setting, Text(", ").join(cells))
    return table


def run_csv(searches: Sequence[Search]) -> str:
    """Return the accuracy of every run as CSV; a run that belongs to two settings has two rows."""
    rows = [
        {
            "method": search.method,
            "setting": trial.setting,
            "value": shown(trial.value),
            "split": "" if run.split is None else run.split,
            "seed": run.seed,
            "personalized_accuracy": accuracy(run),
            "folder": run.folder,
        }
        for search, trials in _rows(searches)
        for trial in trials
        for run in trial.runs
    ]
    return csv_text(rows)


def _rows(searches: Sequence[Search]) -> Iterator[tuple[Search, list[Trial]]]:
    for search in searches:
        for trials in search.tried:
            yield search, trials


def _cell(trial: Trial) -> str:
    found = trial.accuracy()
    return f"{shown(trial.value)}: {'-' if found is None else f'{100 * found:.2f}'}"


def _at_an_end(searches: Sequence[Search]) -> list[str]:
    """Return a sentence about best values that are the first or last of those tried: a better one may lie beyond."""
    ends = [
        f"{search.method} ({trials[0].setting} {shown(search.best[trials[0].setting])})"
        for search, trials in _rows(searches)
        if search.best.get(trials[0].setting) in (trials[0].value, trials[-1].value)
    ]
    return [f"At an end of the values that were tried: {', '.join(ends)}."] if ends else []
