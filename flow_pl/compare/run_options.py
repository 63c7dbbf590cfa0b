"""The options that commands share which run several methods."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flow_pl import shipped
from flow_pl.errors import ConfigurationError
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.validation import require_count, require_positive
from flow_pl.utils.words import check_options

GIVEN = {
    "--seed_everything": "use --seeds",
    "--trainer.default_root_dir": "use --out",
    "--ckpt_path": "interrupted runs are resumed automatically",
    "--print_config": "use `flow-pl fit --print_config`",
}
"""Options of a run that such a command sets, each with what to do instead."""


@dataclass(frozen=True)
class RunOptions:
    """Options of a command that runs several methods.

    Attributes:
        common: configurations of every run, such as the task's, in order.
        methods: the configuration of each method, by name.
        seeds: seeds of the runs.
        split_seeds: seeds of the federation's splits, each run with all `seeds`; None for the task's split only.
        folder: output folder.
        name: name of the comparison.
        jobs: number of parallel runs.
        allow_different: whether to accept runs whose data, evaluation or budgets differ.
        passed_on: options passed on to every run.
    """

    common: Sequence[Path]
    methods: Mapping[str, Path]
    seeds: Sequence[int]
    split_seeds: Sequence[int] | None
    folder: Path
    name: str
    jobs: int
    allow_different: bool
    passed_on: Sequence[str]


def add_run_options(parser: Parser, folder: str) -> None:
    """Add the options that say which methods are run how often, and where.

    Args:
        parser: parser of a command.
        folder: folder that the default output folder is in, for the help.
    """
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="configuration of every run, such as task/digits; can be repeated",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME",
        help="a configuration for each method, such as method/*.yaml; a method is named after its file",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of the runs (default: 0)")
    parser.add_argument(
        "--split-seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="repeat everything over splits of the federation: new clients, held-out examples, a drawn partition; for "
        "generated data also the clients (default: the task's split only)",
    )
    parser.add_argument(
        "--out", type=home, metavar="FOLDER", help=f"output folder (default: {folder} and the task's name)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of parallel runs, each in one thread if N > 1"
    )
    parser.add_argument(
        "--allow-different",
        action="store_true",
        help="also accept runs with different data, backbones, evaluation or budgets (rounds, cohorts, epochs, "
        "optimizers, batch sizes)",
    )


def check_run_options(
    options: argparse.Namespace,
    passed_on: Sequence[str],
    parser: Parser,
    also: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Check the options of `add_run_options`, and those that are passed on.

    Args:
        options: the parsed options.
        passed_on: the other words of the command line.
        parser: parser of the command.
        also: further options of a run that the command sets, each with what to do instead.

    Raises:
        ConfigurationError: an option is invalid.
    """
    require_positive(jobs=options.jobs)
    for setting, seeds in (("--seeds", options.seeds), ("--split-seeds", options.split_seeds or [])):
        if len(set(seeds)) < len(seeds):
            raise ConfigurationError(f"{setting} is {seeds}, expected distinct seeds.")
        for seed in seeds:
            require_count(0, **{setting: seed})
            if seed >= 2**32:
                raise ConfigurationError(f"{setting} is {seed}, expected less than 2^32.")
    given = {**GIVEN, **also}
    for option in passed_on:
        name = option.partition("=")[0]
        if name == "--data.split_seed" and options.split_seeds:
            raise ConfigurationError("--data.split_seed and --split-seeds are both given: leave one of them out.")
        if name in given:
            raise ConfigurationError(f"{name} cannot be set for the runs of `{parser.prog}`: {given[name]}.")
    if passed_on and not passed_on[0].startswith("-"):
        raise ConfigurationError(f"{passed_on[0]!r} is not an option: see `{parser.prog} --help`.")
    check_options(["fit", *passed_on], parser.prog, parser.options())


def run_options(given: argparse.Namespace, passed_on: Sequence[str], kind: str) -> dict[str, Any]:
    """Return the values of `RunOptions`.

    Args:
        given: the parsed options of `add_run_options`.
        passed_on: the other words of the command line.
        kind: folder of `runs/` that the default output folder is in.

    Raises:
        ConfigurationError: a configuration does not exist.
    """
    common = [shipped.find(name) for name in given.config]
    methods = find_methods(given.methods)
    name = given.out.name if given.out else comparison_name(common, methods.values())
    return {
        "common": common,
        "methods": methods,
        "seeds": given.seeds,
        "split_seeds": given.split_seeds,
        "folder": given.out or Path("runs", kind, name),
        "name": name,
        "jobs": given.jobs,
        "allow_different": given.allow_different,
        "passed_on": passed_on,
    }


def find_methods(patterns: Sequence[str]) -> dict[str, Path]:
    """Return the configurations of the methods by name.

    Args:
        patterns: names, files or glob patterns; see `flow_pl.shipped.match`.

    Raises:
        ConfigurationError: a file does not exist, or two have the same name.
    """
    methods: dict[str, Path] = {}
    for path in chain.from_iterable(map(shipped.match, patterns)):
        if path.stem in methods:
            raise ConfigurationError(
                f"{methods[path.stem]} and {path} would both be called {path.stem}: rename one of them."
            )
        methods[path.stem] = path
    return methods


def comparison_name(common: Sequence[Path], methods: Iterable[Path]) -> str:
    """Return the name of a comparison: that of the common configurations, or else of the methods' folder.

    Args:
        common: configurations of every run.
        methods: the configuration of each method.

    Raises:
        ConfigurationError: there are no common configurations, and the methods are in several folders.
    """
    folders = {path.resolve().parent.name for path in methods}
    if not common and len(folders) > 1:
        raise ConfigurationError("the configurations are in several folders: choose the output folder with --out.")
    return shipped.run_name(common) or folders.pop()
