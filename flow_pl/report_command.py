"""The command `flow-pl report`: test a finished run with the callback that writes the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flow_pl.callbacks import RoutingReport
from flow_pl.cli import run
from flow_pl.configuration import read_settings
from flow_pl.errors import ConfigurationError
from flow_pl.results.run_folder import CONFIG
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.words import no_such_option

SECTIONS = ("--trainer.", "--data.", "--model.")


def report(args: Sequence[str]) -> None:
    """Run the command.

    Args:
        args: the arguments after its name.

    Raises:
        ConfigurationError: the folder is not that of a run or holds no trained model, or an option is invalid.
    """
    parser = _make_parser()
    options, overrides = parser.parse_known_args(args)
    before = ""
    for word in overrides:
        value_of_option = before.startswith("--") and "=" not in before and not word.startswith("--")
        if not (word.startswith(SECTIONS) or value_of_option):
            raise ConfigurationError(no_such_option(word.partition("=")[0], parser.options(), parser.prog))
        before = "" if value_of_option else word
    config = options.run / CONFIG
    if not config.is_file():
        raise ConfigurationError(
            f"{options.run} is not the folder of a run: it has no {CONFIG}. A fit prints the folder of its run, "
            "such as "
            "runs/digits/flow."
        )
    name = RoutingReport.__name__
    has_it = any(_is(callback, name) for callback in _callbacks(read_settings(config)))
    words = ["test", f"--config={config}", f"--trainer.default_root_dir={options.run}"]
    words += [] if has_it else [f"--trainer.callbacks+={name}"]
    words += [] if options.ckpt_path is None else [f"--ckpt_path={options.ckpt_path}"]
    cli = run([*words, *overrides])
    if cli.trainer.is_global_zero:
        callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
        page = next(callback.path for callback in callbacks if isinstance(callback, RoutingReport))
        print(f"report: {options.run / page}")


def _make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="flow-pl report",
        description="Test a finished run and write its results, clients and routes to one HTML page, report.html, "
        "in its folder.",
        epilog="Options of a run, such as --trainer.callbacks.clients=20, can be added.",
    )
    parser.add_argument("run", type=home, metavar="RUN", help="folder of the run, such as runs/digits/flow")
    parser.add_argument("--ckpt_path", metavar="FILE", help="checkpoint to test (default: the best one in the folder)")
    return parser


def _callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks in the settings of a run."""
    listed = (settings.get("trainer") or {}).get("callbacks") or []
    return listed if isinstance(listed, list) else [listed]


def _is(callback: dict[str, Any], name: str) -> bool:
    """Return whether a callback in a configuration has this class name."""
    return str(callback.get("class_path", "")).rpartition(".")[2] == name
