"""Parse the command line of `flow-pl compare`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from flow_pl import shipped
from flow_pl.errors import ConfigurationError
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.validation import require_choice, require_count, require_positive
from flow_pl.utils.words import check_options

GIVEN = {
    "--seed_everything": "use --seeds",
    "--trainer.default_root_dir": "use --out",
    "--ckpt_path": "interrupted runs are resumed automatically",
    "--print_config": "use `flow-pl fit --print_config`",
}
"""Options of a run that this command sets, each with what to do instead."""

POPULATIONS = ("seen", "new")
"""Populations that a test reports."""

CONTROL = "interpolation_votes"
"""The default reference method: the average of global model, local model and memory."""


@dataclass(frozen=True)
class Options:
    """Options of `flow-pl compare`.

    Attributes:
        common: configurations of every run, such as the task's, in order.
        methods: the configuration of each method, by name.
        seeds: seeds of the runs.
        split_seeds: seeds of the federation's splits, each run with all `seeds`; None for the task's split only.
        reference: the method that the others are tested against; None for the best of each column.
        folder: output folder.
        name: name of the comparison.
        populations: client populations to show; None for all.
        checkpoint: the checkpoint to test, "last" or "best".
        jobs: number of parallel runs.
        allow_different: whether to compare runs whose data, evaluation or budgets differ.
        passed_on: options passed on to every run.
    """

    common: Sequence[Path]
    methods: Mapping[str, Path]
    seeds: Sequence[int]
    split_seeds: Sequence[int] | None
    reference: str | None
    folder: Path
    name: str
    populations: Sequence[str] | None
    checkpoint: str
    jobs: int
    allow_different: bool
    passed_on: Sequence[str]


def parse(args: Sequence[str]) -> Options:
    """Parse the command line.

    Args:
        args: the arguments after `flow-pl compare`.

    Raises:
        ConfigurationError: an option is invalid.
    """
    parser = _make_parser()
    given, passed_on = parser.parse_known_args(args)
    _check(given, passed_on, parser.options())
    common = [shipped.find(name) for name in given.config]
    methods = find_methods(given.methods)
    name = given.out.name if given.out else comparison_name(common, methods.values())
    return Options(
        common=common,
        methods=methods,
        seeds=given.seeds,
        split_seeds=given.split_seeds,
        reference=find_reference(given.reference, methods),
        folder=given.out or Path("runs", "compare", name),
        name=name,
        populations=given.populations,
        checkpoint=given.checkpoint,
        jobs=given.jobs,
        allow_different=given.allow_different,
        passed_on=passed_on,
    )


def _make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="flow-pl compare",
        description="Train and test several methods on one task with several seeds, and compare them.",
        epilog="Any other option is passed on to every run, as to `flow-pl fit`, for example --trainer.max_epochs "
        "20. The same command resumes where it was interrupted and skips the runs that are done.",
    )
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
        "--reference",
        metavar="METHOD",
        help=f"method that the others are tested against (default: {CONTROL} if it is compared, else the best of each "
        "column)",
    )
    parser.add_argument(
        "--out", type=home, metavar="FOLDER", help="output folder (default: runs/compare/ and the task's name)"
    )
    parser.add_argument(
        "--populations", nargs="+", metavar="NAME", help="clients to show, such as seen (default: all that were tested)"
    )
    parser.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="checkpoint to test (default: last)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="number of parallel runs, each in one thread if N > 1"
    )
    parser.add_argument(
        "--allow-different",
        action="store_true",
        help="also compare runs with different data, backbones, evaluation or budgets (rounds, cohorts, epochs, "
        "optimizers, batch sizes)",
    )
    return parser


def _check(options: argparse.Namespace, passed_on: Sequence[str], own: Sequence[str]) -> None:
    require_positive(jobs=options.jobs)
    for setting, seeds in (("--seeds", options.seeds), ("--split-seeds", options.split_seeds or [])):
        if len(set(seeds)) < len(seeds):
            raise ConfigurationError(f"{setting} is {seeds}, expected distinct seeds.")
        for seed in seeds:
            require_count(0, **{setting: seed})
            if seed >= 2**32:
                raise ConfigurationError(f"{setting} is {seed}, expected less than 2^32.")
    for population in options.populations or ():
        require_choice(POPULATIONS, **{"--populations": population})
    for option in passed_on:
        name = option.partition("=")[0]
        if name == "--data.split_seed" and options.split_seeds:
            raise ConfigurationError("--data.split_seed and --split-seeds are both given: leave one of them out.")
        if name in GIVEN:
            raise ConfigurationError(f"{name} cannot be set for the runs of a comparison: {GIVEN[name]}.")
    if passed_on and not passed_on[0].startswith("-"):
        raise ConfigurationError(f"{passed_on[0]!r} is not an option: see `flow-pl compare --help`.")
    check_options(["fit", *passed_on], "flow-pl compare", own)


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


def find_reference(name: str | None, methods: Collection[str]) -> str | None:
    """Return the method that the others are tested against; None for the best of each column.

    Args:
        name: the given name; None for `CONTROL`, if it is compared.
        methods: names of the compared methods.

    Raises:
        ConfigurationError: the named method is not compared.
    """
    if name is None:
        return CONTROL if CONTROL in methods else None
    if name not in methods:
        raise ConfigurationError(f"--reference is {name}, expected one of --methods: {', '.join(methods)}.")
    return name


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
