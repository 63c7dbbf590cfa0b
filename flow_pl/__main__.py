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
    "export": "write a trained model as a file that needs no flow_pl",
    "personalize": "the same for a client whose examples are in a file",
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
        if words[0] == "configs":
            shipped.command(words[1:])
            return
    except FlowError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    # from here on imports take seconds
    from flow_pl.cli import run, told

    with told():
        if words[0] == "compare":
            from flow_pl.compare.command import compare

            status = compare(words[1:])
            if status:
                raise SystemExit(status)
        elif words[0] in ("export", "personalize"):
            from flow_pl.export_command import command

            command(words[0], words[1:])
        else:
            run(None if args is None else words)


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
