"""Normalize command lines written by programs, and report unknown options, without importing torch."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from flow_pl.errors import ConfigurationError

OWN = ("help", "h", "config", "c", "print_config", "seed_everything", "trainer", "model", "data")
"""Options of every Lightning command, without dashes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests the nearest known name, to end a message; empty if none is close.

    Case and the dashes of an option are ignored.
    """
    return _question(name, {each: each for each in known})


def no_such_option(option: str, known: Iterable[str], command: str) -> str:
    """Return the message for an unknown option.

    Args:
        option: the option with its dashes; without a section, it may be the last part of a known one.
        known: the known options.
        command: the command, such as `flow-pl fit`.
    """
    names = {each: each for each in known}
    if "." not in option:
        names |= {each.rpartition(".")[2]: each for each in names if "." in each}
    return f"there is no option {option}.{_question(option, names)} `{command} --help` lists the options."


def _question(name: str, known: Mapping[str, str]) -> str:
    """Suggest the value of the nearest key; see `nearest`."""
    names = {key.lower().lstrip("-"): value for key, value in reversed(list(known.items()))}
    near = difflib.get_close_matches(name.lower().lstrip("-"), list(names), 1, 0.6)
    return f" Did you mean {names[near[0]]}?" if near else ""


def nulls(words: Sequence[str]) -> list[str]:
    """Convert values from Python to YAML: sweep agents write None for null, also within lists.

    Args:
        words: words of the command line.
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
    """Refuse an option that neither the trainer, the model nor the command has.

    Options are looked up in the source files, which takes a fraction of the time to import them. The options of data,
    method and backbone depend on their class and are left to the parser.

    Args:
        words: a Lightning command line: `fit`, `validate`, `test` or `predict`, and its options.
        name: the command that passes them on, if it is another one.
        also: options of that command, for suggestions.

    Raises:
        ConfigurationError: an option is unknown; the message suggests the nearest one.
    """
    command, *rest = words
    trainer = _lightning_trainer()
    if trainer is None:
        return
    package = Path(__file__).parents[1]
    sections = {
        "trainer": _parameters(trainer, "Trainer", "__init__"),
        "model": _parameters(package / "module" / "federated.py", "FederatedModule", "__init__"),
    }
    options = [f"--{option}" for option in (*OWN, *_parameters(trainer, "Trainer", command))]
    # those of the base classes of data and loop suffice for suggestions
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
    """Return the source file of Lightning's Trainer."""
    spec = importlib.util.find_spec("lightning")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = (Path(folder, "pytorch", "trainer", "trainer.py") for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _parameters(file: Path, owner: str, function: str) -> Collection[str]:
    """Return the parameter names of a method, except self."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == owner:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == function:
                    arguments = method.args
                    return [each.arg for each in (*arguments.args, *arguments.kwonlyargs)][1:]
    return []
