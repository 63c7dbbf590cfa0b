"""The command `flow-pl compare`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import get_console
from rich.console import Console

from flow_pl.compare.execution import check_folder, execute_all, resolve_all
from flow_pl.compare.formats import caption, markdown, method_csv, rich_tables, run_csv
from flow_pl.compare.options import Options, parse
from flow_pl.compare.runs import Run, check_same_data, read_run
from flow_pl.compare.settings import Settings, budgets, with_split
from flow_pl.compare.testable import check_testable
from flow_pl.compare.tracking import log_comparison
from flow_pl.errors import ConfigurationError
from flow_pl.results.runs import Comparison
from flow_pl.utils.files import write_text
from flow_pl.utils.optional import import_optional


def compare(args: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: the arguments after `flow-pl compare`.

    Returns:
        The exit status: 0, 1 if a run failed, 130 if the user stopped it.

    Raises:
        ConfigurationError: the options or configurations are invalid; nothing was run.
    """
    options = parse(args)
    import_optional("matplotlib", "compare", "flow-pl compare")
    settings, different = resolve_all(options)
    check_testable(settings, options.checkpoint)
    runs = _plan(options, settings)
    check_folder(options.folder)
    console = get_console()
    failures = execute_all(runs, options.jobs, console)
    if failures is None:
        console.print("Stopped. Run the same command again to resume.")
        return 130
    notes = [f"Settings that differ:\n{different}"] if different else []
    comparison = _collect(options, runs, notes, budgets(settings))
    if comparison is not None:
        _publish(comparison, [run for run in runs if run not in failures], options.folder, console)
    for run, failure in failures.items():
        print(f"failed: {run.name}: {failure}\n  see {run.log}", file=sys.stderr)
    return 1 if failures else 0


def _plan(options: Options, settings: Mapping[str, Settings]) -> list[Run]:
    """Return all runs, ordered by split, then seed, then method, so that a first table is available early."""
    runs = []
    for split in options.split_seeds or (None,):
        splits = settings if split is None else {name: with_split(each, split) for name, each in settings.items()}
        for seed in options.seeds:
            for method, each in splits.items():
                folder = options.folder / "runs" / method / ("" if split is None else f"split{split}") / f"seed{seed}"
                runs.append(Run(method, seed, folder, each, options.checkpoint, options.name, split))
    return runs


def _collect(options: Options, runs: Sequence[Run], notes: list[str], own: dict[str, str]) -> Comparison | None:
    """Return the results of the runs that are done; None if there are none."""
    finished = [run for run in runs if run.state() == "done"]
    check_same_data(finished)
    done = [read_run(run) for run in finished]
    methods = {method: [run for run in done if run.method == method] for method in options.methods}
    seeds, splits = len(options.seeds), len(options.split_seeds or [])
    ought, word = seeds * max(splits, 1), "runs" if splits else "seeds"
    tested = list(dict.fromkeys(population for run in done for population in run.populations))
    unknown = [population for population in options.populations or () if population not in tested]
    if unknown and tested:
        raise ConfigurationError(f"--populations is {' '.join(unknown)}, expected some of {', '.join(tested)}.")
    notes += [
        f"{method} has {len(found)} of {ought} {word}." for method, found in methods.items() if len(found) < ought
    ]
    methods = {method: found for method, found in methods.items() if found}
    shown = list(options.populations or tested)
    if not methods:
        return None
    return Comparison(options.name, methods, shown, seeds, notes, own, splits, options.reference)


def _publish(comparison: Comparison, runs: Sequence[Run], folder: Path, console: Console) -> None:
    """Print the tables, write all files, and log them where the runs are logged."""
    from flow_pl.results.figures import draw  # nothing else imports matplotlib

    tables = {"table": folder / "table.csv", "runs": folder / "runs.csv"}
    write_text(tables["table"], method_csv(comparison))
    write_text(tables["runs"], run_csv(comparison))
    write_text(folder / "table.md", markdown(comparison))
    figures = draw(comparison, folder)
    for table in rich_tables(comparison, console):
        console.print(table)
    for sentence in caption(comparison):
        console.print(sentence, highlight=False, markup=False)
    written = [folder / "table.md", *tables.values(), *figures.values()]
    console.print(f"Written: {', '.join(map(str, written))}", highlight=False, markup=False, soft_wrap=True)
    log_comparison(runs, tables, figures, comparison.name)
