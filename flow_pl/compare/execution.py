"""Resolve the settings of several methods, and execute their runs with a display of the progress."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from flow_pl.compare.display import Display
from flow_pl.compare.pool import execute
from flow_pl.compare.run_options import RunOptions
from flow_pl.compare.runs import Run, State
from flow_pl.compare.settings import Settings, check_comparable, resolve
from flow_pl.errors import ConfigurationError

STATES: dict[State, str] = {
    "done": "done, skipped",
    "interrupted": "interrupted, resumed",
    "changed": "made with other settings or another version of flow_pl, run again",
}


def resolve_all(options: RunOptions) -> tuple[dict[str, Settings], str]:
    """Resolve the settings of all methods; return them, and those that differ but must be equal to compare methods.

    Args:
        options: options of the command.

    Raises:
        ConfigurationError: settings are invalid, or differ without `allow_different`.
    """
    settings = {method: resolve([*options.common, path], options.passed_on) for method, path in options.methods.items()}
    different = check_comparable(settings)
    if different and not options.allow_different:
        raise ConfigurationError(
            f"the configurations cannot be compared, since these settings differ:\n{different}\n"
            "Give such an option to every run (as in --data.cohort_size 10), correct the configurations, or add "
            "--allow-different."
        )
    return settings, different


def check_folder(folder: Path) -> None:
    """Create the output folder.

    Args:
        folder: the folder.

    Raises:
        ConfigurationError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be created: {error}. Choose another folder with --out.") from error
    if not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{folder} cannot be written to. Choose another folder with --out.")


def execute_all(runs: Sequence[Run], jobs: int, console: Console) -> dict[Run, str] | None:
    """Execute the runs that are not done; return the failures, or None if the user stopped them.

    Args:
        runs: all runs.
        jobs: number of parallel runs.
        console: shows the progress.
    """
    states = {run: run.state() for run in runs}
    for run, state in states.items():
        if state in STATES:
            console.print(f"{run.name}: {STATES[state]}", highlight=False, markup=False, soft_wrap=True)
    seconds: dict[str, list[float]] = {}
    for run, state in states.items():
        if state == "done":
            seconds.setdefault(run.method, []).append(run.results()["seconds"])
    waiting = [run for run in runs if states[run] != "done"]
    try:
        with Display(console, waiting, len(runs) - len(waiting), seconds, jobs) as display:
            return execute(waiting, jobs, display)
    except KeyboardInterrupt:
        return None
