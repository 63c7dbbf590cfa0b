"""The command line of `flow-pl compare`."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from flow_pl.errors import ConfigurationError
from flow_pl.utils.validation import require_positive

GIVEN = {
    "--config": "which compare takes itself",
    "--seed_everything": "use --seeds",
    "--trainer.default_root_dir": "use --out",
    "--ckpt_path": "runs that were interrupted are resumed by themselves",
    "--print_config": "use `flow-pl fit --print_config`",
}
"""Options of a run that this command sets, and what to do instead."""


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        configs: the configurations by the names of their methods.
        seeds: of the runs.
        folder: where the results go.
        name: of the comparison.
        populations: clients to show; None for all.
        checkpoint: which one is tested, "last" or "best".
        jobs: runs side by side.
        allow_different: whether runs may differ in what must be equal.
        passed_on: options for every run.
    """

    configs: Mapping[str, Path]
    seeds: Sequence[int]
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
    given, passed_on = _make_parser().parse_known_args(args)
    _check(given, passed_on)
    configs = find_configs(given.config)
    name = given.out.name if given.out else comparison_name(configs.values())
    return Options(
        configs=configs,
        seeds=given.seeds,
        folder=given.out or Path("runs", "compare", name),
        name=name,
        populations=given.populations,
        checkpoint=given.checkpoint,
        jobs=given.jobs,
        allow_different=given.allow_different,
        passed_on=passed_on,
    )


def _make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="flow-pl compare",
        description="Train and test several configurations with several seeds; tables and figures of all of them.",
        epilog="Any other option is given to every run, as to `flow-pl fit`: --trainer.max_epochs 20, say, or "
        "--data.path x.npz. The same command goes on where it was interrupted, and skips the runs that are done.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE", help="configurations; the name of a method is its file's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of the runs (default: 0)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: runs/compare/ and the configurations' folder"
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
        help="also compare runs with different data, rounds, cohorts, batch sizes, backbones or evaluation",
    )
    return parser


def _check(options: argparse.Namespace, passed_on: Sequence[str]) -> None:
    require_positive(jobs=options.jobs)
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigurationError(f"--seeds is {options.seeds}, expected different ones.")
    for option in passed_on:
        name = option.partition("=")[0]
        if name in GIVEN:
            raise ConfigurationError(f"{name} cannot be given to the runs of a comparison: {GIVEN[name]}.")
    if passed_on and not passed_on[0].startswith("-"):
        raise ConfigurationError(f"{passed_on[0]!r} is no option: see `flow-pl compare --help`.")


def find_configs(patterns: Sequence[str]) -> dict[str, Path]:
    """The configurations by the names of their methods; patterns that no shell has expanded are expanded.

    Args:
        patterns: files or patterns.

    Raises:
        ConfigurationError: there is no such file, or two have the same name.
    """
    found = [sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern] for pattern in patterns]
    configs: dict[str, Path] = {}
    for path in map(Path, chain(*found)):
        if not path.is_file():
            raise ConfigurationError(f"there is no configuration {path}.")
        if path.stem in configs:
            raise ConfigurationError(
                f"{configs[path.stem]} and {path} would both be called {path.stem}: rename one of them."
            )
        configs[path.stem] = path
    if not configs:
        raise ConfigurationError(f"--config {' '.join(patterns)} matches no file.")
    return configs


def comparison_name(configs: Iterable[Path]) -> str:
    """The name of a comparison: the configurations' folder, below `configs` where it is in such a one.

    Args:
        configs: the files.

    Raises:
        ConfigurationError: they are in several folders.
    """
    folders = {path.resolve().parent for path in configs}
    if len(folders) > 1:
        raise ConfigurationError("the configurations are in several folders: say where the results go with --out.")
    parts = folders.pop().parts
    below = len(parts) - parts[::-1].index("configs") if "configs" in parts else len(parts) - 1
    return "/".join(parts[below:]) or parts[-1]
