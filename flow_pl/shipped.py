"""Find, list and copy the configurations shipped with the package.

A run is composed of small files, `flow-pl fit -c task/digits -c method/ditto`. A name is the path of a file below
`configs/` without its extension; a file with that path in the working folder takes precedence.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flow_pl.errors import ConfigurationError
from flow_pl.utils.arguments import Parser, home
from flow_pl.utils.files import write_text

FOLDER = Path(__file__).with_name("configs")
"""Folder of the shipped files."""

KINDS = {
    "task": "data, backbone, budget and rounds",
    "federation": "how a task splits a file into clients; given after the task",
    "model": "another backbone for a task; given after the task",
    "server": "how the server updates its model; given after the task",
    "method": "a federated method, the same for every task",
    "tuned": "a method with settings tuned for a task, instead of method/",
    "ablation": "one setting of Flow changed; given last",
    "logger": "where metrics go besides the screen",
    "sweep": "Weights & Biases sweeps, for `wandb sweep`",
}
"""Folders of shipped files, in listing order."""

OPTIONS = ("-c", "--config")
"""Options of a command that take a configuration."""


def names() -> list[str]:
    """Return the names of all shipped configurations, sorted by kind."""
    found = [path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")]
    kinds = list(KINDS)
    return sorted(found, key=lambda name: (kinds.index(name.partition("/")[0]), name))


def find(name: str) -> Path:
    """Return the file for a name or path.

    Args:
        name: path of a file, or name of a shipped one, with or without `.yaml`.

    Raises:
        ConfigurationError: there is no such file; the message suggests the nearest name.
    """
    for path in (Path(name).expanduser(), FOLDER / name, FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    near = difflib.get_close_matches(name.removesuffix(".yaml"), names(), 1, 0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigurationError(
        f"there is no configuration {name}, neither as a file nor among the shipped ones.{hint} "
        "`flow-pl configs` lists those."
    )


def match(pattern: str) -> list[Path]:
    """Return the files that match a pattern, sorted; from the working folder, or else the shipped ones.

    Args:
        pattern: a shell pattern, such as `method/*.yaml`, `method/*` or `~/mine/*.yaml`; a plain name matches one
            file.

    Raises:
        ConfigurationError: no file matches.
    """
    if not any(sign in pattern for sign in "*?["):
        return [find(pattern)]
    # Path.glob refuses a pattern that begins at the root
    matching = glob.glob(os.path.expanduser(pattern), recursive=True)
    here = sorted(path for path in map(Path, matching) if path.is_file())
    found = here or [
        FOLDER / f"{name}.yaml" for name in names() if fnmatch.fnmatch(name, pattern.removesuffix(".yaml"))
    ]
    if not found:
        raise ConfigurationError(
            f"{pattern} matches no file, neither here nor among the shipped ones: `flow-pl configs` lists those."
        )
    return found


def expand(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace the names given with `-c` or `--config` on a command line by their files.

    Args:
        args: arguments of the command line.

    Returns:
        The arguments, and the files in order.

    Raises:
        ConfigurationError: see `find`.
    """
    expanded, files = [], []
    expected = False
    for word in args:
        option, sign, value = word.partition("=")
        if expected:
            files.append(str(find(word)))
            expanded.append(files[-1])
        elif option in OPTIONS and sign:
            files.append(str(find(value)))
            expanded.append(f"{option}={files[-1]}")
        else:
            expanded.append(word)
        expected = not expected and word in OPTIONS
    return expanded, files


def run_name(files: Iterable[str | os.PathLike[str]]) -> str:
    """Return the name of a run, and of its folder, from the files that compose it.

    Task and method make `digits/flow`; an ablation is appended, as in `digits/flow-routing_hard`, and so is a
    federation, a model or a server; loggers are ignored, and a file from another folder contributes its own name.

    Args:
        files: the files, in the order of the command line.
    """
    parts: list[str] = []
    for path in map(Path, files):
        kind = next((folder for folder in path.parts[-3:-1] if folder in KINDS), None)
        if kind in ("ablation", "federation", "model", "server") and parts:
            parts[-1] += f"-{path.stem}"
        elif kind not in ("logger", "sweep") and path.stem not in parts:
            parts.append(path.stem)
    return "/".join(parts)


def command(args: Sequence[str]) -> int:
    """Run `flow-pl configs`: list the shipped configurations, or copy one.

    Args:
        args: the arguments after `flow-pl configs`.

    Returns:
        The exit status.

    Raises:
        ConfigurationError: there is no such configuration, or a copy would replace a file.
    """
    parser = Parser(
        prog="flow-pl configs",
        description="List the shipped configurations, each with a one-line description.",
        epilog="Pass them to a run by name: flow-pl fit -c task/digits -c method/flow",
    )
    commands = parser.add_subparsers(dest="command", title="commands")
    copied = commands.add_parser("copy", help="copy one to a folder, to edit it")
    copied.add_argument("name", help="such as task/digits")
    copied.add_argument("folder", nargs="?", default=Path(), type=home, help="target folder (default: here)")
    given = parser.parse_args(args)
    if given.command == "copy":
        source = find(given.name)
        target = given.folder / source.name
        try:
            given.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{given.folder} cannot be created ({error}): choose another folder.") from error
        if target.exists():
            raise ConfigurationError(f"{target} already exists: choose another folder, or remove it first.")
        write_text(target, source.read_text(encoding="utf-8"))
        print(target)
        return 0
    last = ""
    for name in names():
        kind = name.partition("/")[0]
        if kind != last:
            sys.stdout.write(f"{'' if not last else chr(10)}{kind}/  {KINDS[kind]}\n")
            last = kind
        sys.stdout.write(f"  {name:<46}{title(name)}\n")
    return 0


def title(name: str) -> str:
    """Return the description of a shipped configuration, its first line."""
    return find(name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
