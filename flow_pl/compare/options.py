"""Parse the command line of `flow-pl compare`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flow_pl.compare.run_options import RunOptions, add_run_options, check_run_options, run_options
from flow_pl.errors import ConfigurationError
from flow_pl.utils.arguments import Parser
from flow_pl.utils.validation import require_choice

POPULATIONS = ("seen", "new")
"""Populations that a test reports."""

CONTROL = "interpolation_votes"
"""The default reference method: the average of global model, local model and memory."""


@dataclass(frozen=True)
class Options(RunOptions):
    """Options of `flow-pl compare`.

    Attributes:
        reference: the method that the others are tested against; None for the best of each column.
        populations: client populations to show; None for all.
        checkpoint: the checkpoint to test, "last" or "best".
    """

    reference: str | None
    populations: Sequence[str] | None
    checkpoint: str


def parse(args: Sequence[str]) -> Options:
    """Parse the command line.

    Args:
        args: the arguments after `flow-pl compare`.

    Raises:
        ConfigurationError: an option is invalid.
    """
    parser = _make_parser()
    given, passed_on = parser.parse_known_args(args)
    check_run_options(given, passed_on, parser)
    for population in given.populations or ():
        require_choice(POPULATIONS, **{"--populations": population})
    common = run_options(given, passed_on, "compare")
    return Options(
        **common,
        reference=find_reference(given.reference, common["methods"]),
        populations=given.populations,
        checkpoint=given.checkpoint,
    )


def _make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="flow-pl compare",
        description="Train and test several methods on one task with several seeds, and compare them.",
        epilog="Any other option is passed on to every run, as to `flow-pl fit`, for example --trainer.max_epochs "
        "20. The same command resumes where it was interrupted and skips the runs that are done.",
    )
    add_run_options(parser, "runs/compare/")
    parser.add_argument(
        "--reference",
        metavar="METHOD",
        help=f"method that the others are tested against (default: {CONTROL} if it is compared, else the best of each "
        "column)",
    )
    parser.add_argument(
        "--populations", nargs="+", metavar="NAME", help="clients to show, such as seen (default: all that were tested)"
    )
    parser.add_argument(
        "--checkpoint", choices=("last", "best"), default="last", help="checkpoint to test (default: last)"
    )
    return parser


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
