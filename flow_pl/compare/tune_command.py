"""The command `flow-pl tune`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich import get_console

from flow_pl.compare.execution import check_folder, execute_all, resolve_all
from flow_pl.compare.run_options import RunOptions, add_run_options, check_run_options, run_options
from flow_pl.compare.runs import Run, check_same_data
from flow_pl.compare.settings import Settings, named_class, with_split
from flow_pl.compare.testable import check_validated, planned_rounds
from flow_pl.compare.tuned_table import markdown, rich_table, run_csv
from flow_pl.compare.tuning import Search, Values, read_values, shown
from flow_pl.configuration import make
from flow_pl.errors import ConfigurationError, FlowError
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.files import write_text

VALIDATED = {
    "--trainer.check_val_every_n_epoch": "a run is validated after its last round",
    "--trainer.num_sanity_val_steps": "a run is validated after its last round",
}
"""Further options of a run that this command sets, each with what to do instead."""


@dataclass(frozen=True)
class Options(RunOptions):
    """Options of `flow-pl tune`.

    Attributes:
        search: file with values to try, in addition to the shipped ones; None for those only.
    """

    search: Path | None


def tune(args: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: the arguments after `flow-pl tune`.

    Returns:
        The exit status: 0, 1 if a run failed, 130 if the user stopped it.

    Raises:
        ConfigurationError: the options, configurations or values to try are invalid; nothing was run.
    """
    options = parse(args)
    values = _values(options)
    settings, _ = resolve_all(options)
    check_validated(settings)
    searches = [Search(name, values[name], _validated_once(each)) for name, each in settings.items()]
    _check_values(searches)
    check_folder(options.folder)
    make_runs = partial(_make_runs, options, {})
    console, executed, failures = get_console(), set[Run](), dict[Run, str]()
    for number in range(max(len(search.values) for search in searches)):
        trials = {search: search.trials(number, make_runs) for search in searches}
        new = dict.fromkeys(run for each in trials.values() for trial in each for run in trial.runs)
        failed = execute_all([run for run in new if run not in executed], options.jobs, console)
        executed |= new.keys()
        if failed is None:
            console.print("Stopped. Run the same command again to resume.")
            return 130
        failures |= failed
        check_same_data(run for run in executed if run.state() == "done")
        for search, each in trials.items():
            search.choose(each)
    _publish(searches, options)
    for run, failure in failures.items():
        print(f"failed: {run.name}: {failure}\n  see {run.log}", file=sys.stderr)
    return 1 if failures else 0


def _make_runs(options: Options, made: dict[Path, Run], method: str, text: str, settings: Settings) -> list[Run]:
    """Return the runs with a method's settings, one for each split and seed; equal settings have the same runs.

    Args:
        options: options of the command.
        made: the runs so far by folder; receives the new ones.
        method: name of the method.
        text: the values of its settings.
        settings: the settings.
    """
    runs = []
    for split in options.split_seeds or (None,):
        own = settings if split is None else with_split(settings, split)
        for seed in options.seeds:
            folder = options.folder / "runs" / method / text.replace(", ", ",")
            folder = folder / ("" if split is None else f"split{split}") / f"seed{seed}"
            run = Run(method, seed, folder, own, None, options.name, split, text)
            runs.append(made.setdefault(folder, run))
    return runs


def parse(args: Sequence[str]) -> Options:
    """Parse the command line.

    Args:
        args: the arguments after `flow-pl tune`.

    Raises:
        ConfigurationError: an option is invalid.
    """
    parser = Parser(
        prog="flow-pl tune",
        description="Try values of the main settings of several methods on one task, the same number for each, on "
        "validation examples; write a configuration of each method with the best ones.",
        epilog="Any other option is passed on to every run, as to `flow-pl fit`, for example --trainer.max_epochs "
        "20. The same command resumes where it was interrupted and skips the runs that are done.",
    )
    add_run_options(parser, "runs/tune/")
    parser.add_argument(
        "--search",
        type=home,
        metavar="FILE",
        help="YAML file with values to try, for methods of your own or instead of the shipped values: for each method "
        "its arguments with lists of values, such as `ditto: {regularization: [0.1, 1.0]}`",
    )
    given, passed_on = parser.parse_known_args(args)
    check_run_options(given, passed_on, parser, VALIDATED)
    return Options(**run_options(given, passed_on, "tune"), search=given.search)


def _values(options: Options) -> dict[str, Values]:
    """Return the values to try for each method."""
    known = read_values(options.search)
    for name in options.methods:
        if name not in known:
            raise ConfigurationError(
                f"there are no values to try for {name}: name them in a file for --search, such as "
                f"`{name}: {{personal_lr_scale: [0.1, 0.3, 1.0]}}`, or `{name}: {{}}` for none."
            )
    return {name: known[name] for name in options.methods}


def _check_values(searches: Sequence[Search]) -> None:
    """Check that every value is one that its method takes, by making the method."""
    for search in searches:
        method = search.settings["model"]["method"]
        cls, given = named_class(method["class_path"]), method.get("init_args", {})
        for setting, values in search.values.items():
            for value in values:
                try:
                    make(cls, {**given, setting: value}, {})
                except FlowError as error:
                    raise ConfigurationError(
                        f"--search: {setting} of {search.method} cannot be {shown(value)}: {error}"
                    ) from error


def _validated_once(settings: Settings) -> Settings:
    """Return settings that validate once, after the last round."""
    trainer = settings["trainer"]
    once = {"check_val_every_n_epoch": planned_rounds(trainer), "num_sanity_val_steps": 0}
    return {**settings, "trainer": {**trainer, **once}}


def _publish(searches: Sequence[Search], options: Options) -> None:
    """Print and write what was tried, and write the methods' configurations with the best values."""
    console = get_console()
    folder = options.folder
    write_text(folder / "table.md", markdown(searches))
    write_text(folder / "runs.csv", run_csv(searches))
    console.print(rich_table(searches))
    written = []
    for search in searches:
        if len(search.best) == len(search.values):
            written.append(folder / f"{search.method}.yaml")
            write_text(written[-1], _config(options.methods[search.method], search.best))
    files = ", ".join(map(str, [folder / "table.md", folder / "runs.csv", *written]))
    console.print(f"Written: {files}", highlight=False, markup=False, soft_wrap=True)
    if written:
        line = f"To compare the tuned methods: flow-pl compare with the same -c, and --methods '{folder}/*.yaml'"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _config(path: Path, best: Mapping[str, Any]) -> str:
    """Return a method's configuration with other settings, as YAML."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    method = config["model"]["method"]
    if isinstance(method, str):
        method = config["model"]["method"] = {"class_path": method}
    if best:
        method["init_args"] = {**method.get("init_args", {}), **best}
    return (
        f"# Chosen on validation examples by `flow-pl tune`, see table.md.\n{yaml.safe_dump(config, sort_keys=False)}"
    )
