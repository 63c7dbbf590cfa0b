"""Command lines as programs write them, and options that do not exist, told without an import of torch."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from flow_pl.errors import ConfigurationError

OWN = ("help", "h", "config", "c", "print_config", "seed_everything", "trainer", "model", "data")
"""Options of every command of Lightning's, without their dashes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A question that ends a message: the nearest of the names that there are; empty where none is near.

    Case does not count, and neither do the dashes of an option.
    """
    return _question(name, {each: each for each in known})


def no_such_option(option: str, known: Iterable[str], command: str) -> str:
    """What to say of an option that does not exist.

    Args:
        option: with its dashes; one without a section may be the last part of one that there is.
        known: the options that do.
        command: whose options they are, such as `flow-pl fit`.
    """
    names = {each: each for each in known}
    if "." not in option:
        names |= {each.rpartition(".")[2]: each for each in names if "." in each}
    return f"there is no option {option}.{_question(option, names)} `{command} --help` lists the options."


def _question(name: str, known: Mapping[str, str]) -> str:
    """See `nearest`; what is named is the value of the nearest key."""
    names = {key.lower().lstrip("-"): value for key, value in reversed(list(known.items()))}
    near = difflib.get_close_matches(name.lower().lstrip("-"), list(names), 1, 0.6)
    return f" Did you mean {names[near[0]]}?" if near else ""


def nulls(words: Sequence[str]) -> list[str]:
    """Values as Python writes them made values of YAML: agents of sweeps write None for null, also within lists.

    Args:
        words: of the command line.
    """
    found: list[str] = []
    for word in words:
        name, sign, value = word.partition("=")
        if word.startswith("--") and sign:
            found.append(f"{name}={_null(value)}")
        elif found and found[-1].startswith("--") and "=" not in found[-1]:
            found.append(_null(word))
        else:
            found.append(word)
    return found


def check_options(words: Sequence[str], name: str = "", also: Iterable[str] = ()) -> None:
    """Refuse an option that the trainer, the model or the command do not have.

    They are looked up in the source files, within a fraction of the seconds that it takes to import them. What data,
    method and backbone take depends on their class, and is left to the parser.

    Args:
        words: of a command line of Lightning's: `fit`, `validate`, `test` or `predict`, and its options.
        name: of the command that passes them on, where it is another.
        also: options of that command, for the nearest name.

    Raises:
        ConfigurationError: there is no such option; names the nearest one.
    """
    command, *rest = words
    trainer = _lightning_trainer()
    if trainer is None:
        return
    package = Path(__file__).parents[1]
    sections = {
        "trainer": _parameters(trainer, "Trainer", "__init__"),
        "model": _parameters(package / "module.py", "FederatedModule", "__init__"),
    }
    options = [f"--{option}" for option in (*OWN, *_parameters(trainer, "Trainer", command))]
    # of any data and loop, which others are derived from: good enough to be the nearest
    near = sections | {
        "data": _parameters(package / "data" / "datamodule.py", "FederatedDataModule", "__init__"),
        "model.loop": _parameters(package / "engine" / "loop.py", "FederatedLoop", "__init__"),
    }
    known = [*also, *options, *(f"--{section}.{each}" for section, names in near.items() for each in names)]
    for word in rest:
        option = word.partition("=")[0].rstrip("+")
        if not option.startswith("--") or option == "--":
            continue
        section, *names = option[2:].split(".")
        if names and section == "data":
            continue
        if names and section in sections:
            found = names[0] in sections[section] or names[0] in ("help", "class_path", "init_args")
        else:
            found = not names and option in options
        if not found:
            raise ConfigurationError(
                no_such_option(".".join(option.split(".")[:2]), known, name or f"flow-pl {command}")
            )


def _null(value: str) -> str:
    if "None" not in value:
        return value
    try:
        meant = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value
    if not (meant is None or isinstance(meant, list | tuple | dict)):
        return value
    try:
        return json.dumps(meant)
    except (TypeError, ValueError):
        return value


def _lightning_trainer() -> Path | None:
    """The source file of Lightning's Trainer."""
    spec = importlib.util.find_spec("lightning")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = (Path(folder, "pytorch", "trainer", "trainer.py") for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _parameters(file: Path, owner: str, function: str) -> Collection[str]:
    """Names of the parameters of a method, but for self."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function:
                    arguments = method.args
                    return [each.arg for each in (*arguments.args, *arguments.kwonlyargs)][1:]
    return []
