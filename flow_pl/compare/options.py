"""The command line of `flow-pl compare`."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from flow_pl import shipped
from flow_pl.errors import ConfigurationError
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.validation import require_count, require_positive
from flow_pl.utils.words import check_options

GIVEN = {
    "--seed_everything": "use --seeds",
    "--trainer.default_root_dir": "use --out",
    "--ckpt_path": "runs that were interrupted are resumed by themselves",
    "--print_config": "use `flow-pl fit --print_config`",
}
"""Options of a run that this command sets, and what to do instead."""

CONTROL = "interpolation_votes"
"""Method that the others are tested against where no other is named: the average of global, local and memory."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        common: configurations of every run, such as the task's, in their order.
        methods: a configuration for each method, by its name.
        seeds: of the runs.
        split_seeds: of the splits of the federation, each with all seeds; None for the task's split alone.
        reference: method that the others are tested against; None for the best of each column.
        folder: where the results go.
        name: of the comparison.
        populations: clients to show; None for all.
        checkpoint: which one is tested, "last" or "best".
        jobs: runs side by side.
        allow_different: whether runs may differ in what must be equal.
        passed_on: options for every run.
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
    """Read the command line.

    Args:
        args: what follows `flow-pl compare`.

    Raises:
        ConfigurationError: an option cannot work.
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
    """The command line."""
    parser = Parser(
        prog="flow-pl compare",
        description="Train and test several methods on one task with several seeds; tables and figures of all of them.",
        epilog="Any other option is given to every run, as to `flow-pl fit`: --trainer.max_epochs 20, say, or "
        "--data.path x.npz. The same command goes on where it was interrupted, and skips the runs that are done.",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        default=[],
        metavar="NAME",
        help="configuration of every run, such as task/digits; may be given several times",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        required=True,
        metavar="NAME",
        help="a configuration for each method, such as method/*.yaml; a method is called as its file",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of the runs (default: 0)")
    parser.add_argument(
        "--split-seeds",
        nargs="+",
        type=int,
        metavar="N",
        help="repeat everything over splits of the federation: new clients, what is held out, a drawn partition; of "
        "generated data also the clients (default: the task's split)",
    )
    parser.add_argument(
        "--reference",
        metavar="METHOD",
        help=f"method that the others are tested against (default: {CONTROL} if it is there, or else the best of each "
        "column)",
    )
    parser.add_argument(
        "--out", type=home, metavar="FOLDER", help="where the results go (default: runs/compare/ and the task's name)"
    )
    parser.add_argument(
        "--populations", nargs="+", metavar="NAME", help="clients to show, such as seen (default: all that are tested)"
    )
    parser.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="which one is tested (default: last)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, each in one thread if N > 1"
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
            raise ConfigurationError(f"{setting} is {seeds}, expected different ones.")
    for seed in options.split_seeds or []:
        require_count(0, **{"--split-seeds": seed})
    for option in passed_on:
        name = option.partition("=")[0]
        if name == "--data.split_seed" and options.split_seeds:
            raise ConfigurationError("--data.split_seed and --split-seeds are both given: leave one of them out.")
        if name in GIVEN:
            raise ConfigurationError(f"{name} cannot be given to the runs of a comparison: {GIVEN[name]}.")
    if passed_on and not passed_on[0].startswith("-"):
        raise ConfigurationError(f"{passed_on[0]!r} is no option: see `flow-pl compare --help`.")
    check_options(["fit", *passed_on], "flow-pl compare", own)


def find_methods(patterns: Sequence[str]) -> dict[str, Path]:
    """The configurations of the methods by their names.

    Args:
        patterns: names, files or patterns; see `flow_pl.shipped.match`.

    Raises:
        ConfigurationError: there is no such file, or two have the same name.
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
    """The method that the others are tested against; None for the best of each column.

    Args:
        name: as given; None for the control, if it is there.
        methods: names of the compared methods.

    Raises:
        ConfigurationError: it is not compared.
    """
    if name is None:
        return CONTROL if CONTROL in methods else None
    if name not in methods:
        raise ConfigurationError(f"--reference is {name}, expected one of --methods: {', '.join(methods)}.")
    return name


def comparison_name(common: Sequence[Path], methods: Iterable[Path]) -> str:
    """The name of a comparison: that of what all runs have in common, or else of the methods' folder.

    Args:
        common: configurations of every run.
        methods: of each method.

    Raises:
        ConfigurationError: there is nothing in common, and the methods are in several folders.
    """
    folders = {path.resolve().parent.name for path in methods}
    if not common and len(folders) > 1:
        raise ConfigurationError("the configurations are in several folders: say where the results go with --out.")
    return shipped.run_name(common) or folders.pop()
