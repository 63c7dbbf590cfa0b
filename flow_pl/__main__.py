"""Dispatch `flow-pl` and `python -m flow_pl`; import torch only when a command needs it."""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from flow_pl import shipped
from flow_pl.errors import FlowError
from flow_pl.utils.lean_imports import lean_imports, names_foreign_code
from flow_pl.utils.words import check_options, nearest
from flow_pl.version import __version__

STAGES = {
    "fit": "train, and validate as configured",
    "validate": "evaluate a checkpoint on validation examples",
    "test": "evaluate a checkpoint on the test examples of seen and of new clients",
    "predict": "write a checkpoint's predictions to a file",
}
"""Lightning's commands, which share their options."""

OTHERS = {
    "compare": (
        "flow_pl.compare.command:compare",
        "train and test several configurations, and compare them in tables and figures",
    ),
    "configs": ("flow_pl.shipped:command", "list the shipped configurations, or copy one"),
    "deploy": ("flow_pl.deploy.command:deploy", "write a run as a Flower app, for clients on other machines"),
    "export": ("flow_pl.export_command:export", "write a trained model as a file that needs no flow_pl"),
    "personalize": (
        "flow_pl.export_command:personalize_client",
        "the same, for a client whose examples are in a file",
    ),
    "report": ("flow_pl.report_command:report", "test a finished run and write its results as an HTML page"),
    "tune": ("flow_pl.compare.tune_command:tune", "try values of the main settings of several methods, for compare"),
}
"""The other commands: a function that takes the remaining arguments and returns an exit status, and a description."""

LIGHT = ("configs",)
"""Commands that need neither torch nor Lightning."""

COMMANDS = {**STAGES, **{name: text for name, (_, text) in OTHERS.items()}}
"""All commands with their descriptions."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; errors that a user can correct end it with one message and exit status 1 or 2.

    Args:
        args: arguments as in `sys.argv[1:]`; None to use those.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"flow-pl {__version__}")
        raise SystemExit(0)
    command = words[0]
    try:
        _look_at(words)
        if command in LIGHT:
            _run_other(command, words[1:])
            return
    except FlowError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    let_threads_sleep()
    # these imports take seconds
    with lean_imports(without_unused=args is None and command in STAGES and _runs_known_code(words)):
        from flow_pl.utils.exit_messages import exit_with_message

        if command in STAGES:
            from flow_pl.cli import run

    with exit_with_message():
        if command in OTHERS:
            _run_other(command, words[1:])
        else:
            run(None if args is None else words)


def let_threads_sleep() -> None:
    """Let torch's threads sleep while they wait for each other, unless the environment sets a wait policy.

    OpenMP's threads spin by default. If another process needs their core, a thread with work waits for one that spins,
    and small models become twenty times slower. OpenMP reads the environment when torch is imported.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _runs_known_code(words: Sequence[str]) -> bool:
    """Return whether a stage names no code other than that of this package, torch, Lightning and flwr_datasets."""
    expanded, files = shipped.expand(words)
    values = [word.partition("=")[2] if word.startswith("-") else word for word in expanded if word not in files]
    try:
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
    except (OSError, ValueError):
        return False  # the command line says what is wrong with the file
    return not names_foreign_code([*texts, *values])


def _run_other(command: str, words: Sequence[str]) -> None:
    """Run a command other than Lightning's."""
    status = pkgutil.resolve_name(OTHERS[command][0])(words)
    if status:
        raise SystemExit(status)


def overview() -> str:
    """Return the text of `flow-pl --help`."""
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(
        [
            "usage: flow-pl COMMAND [OPTIONS]",
            "",
            "Personalized federated learning with PyTorch Lightning, one command for each stage of a run.",
            "",
            *(f"  {name:{width}}{text}" for name, text in COMMANDS.items()),
            "",
            "flow-pl COMMAND --help shows the options of a command, flow-pl --version the version. A first run:",
            "  flow-pl fit -c task/digits -c method/flow",
        ]
    )


def _look_at(words: Sequence[str]) -> None:
    """Refuse mistakes that can be detected without importing the classes.

    Raises:
        ConfigurationError: there is no such command, option or configuration.
    """
    if words[0] in STAGES:
        check_options(words)
        shipped.expand(words)
    elif not words[0].startswith("-") and words[0] not in COMMANDS:
        raise FlowError(
            f"there is no command {words[0]}.{nearest(words[0], COMMANDS)} `flow-pl --help` lists the commands."
        )


if __name__ == "__main__":
    main()
