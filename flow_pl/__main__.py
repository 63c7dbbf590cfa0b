"""`flow-pl`, and `python -m flow_pl`: what can be answered without torch is, the rest goes to `flow_pl.cli`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flow_pl import shipped
from flow_pl.errors import FlowError
from flow_pl.utils.words import check_options, nearest
from flow_pl.version import __version__

STAGES = {
    "fit": "train, and validate as configured",
    "validate": "evaluate a checkpoint on validation examples",
    "test": "evaluate a checkpoint on the test examples of seen and of new clients",
    "predict": "write a checkpoint's predictions to a file",
}
"""Lightning's commands, which share their options."""

COMMANDS = {
    **STAGES,
    "compare": "train and test several configurations; tables and figures of all of them",
    "configs": "list the configurations that come with the package, or copy one",
}
"""All commands, each with what it does."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend ends with one message and exit status 1 or 2.

    Args:
        args: as in `sys.argv[1:]`; None to take those.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        raise SystemExit(0 if words else 2)
    if words[0] == "--version":
        print(f"flow-pl {__version__}")
        raise SystemExit(0)
    try:
        _look_at(words)
    except FlowError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    from flow_pl.cli import main as run_command  # which takes seconds

    run_command(None if args is None else words)


def overview() -> str:
    """What `flow-pl --help` shows."""
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
    """Refuse what can be told to be wrong without the classes themselves.

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
