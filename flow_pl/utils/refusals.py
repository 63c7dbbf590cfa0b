"""Rephrase jsonargparse's errors in one line: what is wrong, and the nearest known name.

The original messages (4.53) list every type that was tried, below the path of the setting, on many lines.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

from flow_pl.errors import brief
from flow_pl.utils.words import nearest

KEY = re.compile(r'Parser key "([^"]+)":')
CLASS = re.compile(r"(?:given class_path |class_path=)'([^']+)'")
OPTION = re.compile(
    r"[Oo]ption '([^']+)' is not accepted|does not accept option '([^']+)'|unrecognized arguments: --(\w+)"
)
NO_MAPPING = re.compile(r"'dict' object has no attribute 'init_args'.*NestedArg\(key='(\w+)\.class_path'")
NESTED = re.compile(r"NestedArg\(key='([^']+)'")
GROUP = re.compile(r"Group '([^']+)' does not accept")
REQUIRED = re.compile(r"the following arguments are required: ([\w.]+(?:, [\w.]+)*)")
NO_CLASS = re.compile(r"Expected a dot import path string:(?: (.+))?$", re.MULTILINE)
NO_PATH = re.compile(r"Expected a path but (.*?) ?either not accessible")
NO_HELP = re.compile(r"--([\w.]+)\.help: Expected a dot import path string: (.+)")
NOT_MADE = re.compile(r"Problem with given class_path '([^']+)':(.+)|Import path (.+) (does not correspond .+)")
EXPECTED = re.compile(r"(?:^|\s)Expected an? (.+?)(?:\. Got value:(?: (.*))?)?$")
GOT = ". Got value:"
VALUE = re.compile(r"Given value:(?: (.*))?$")

MAPPING = re.compile(r"\b'?(\w+)'?(?:=|: |', val=)\{'class_path': '([^']+)'")

PACKAGES = {"partitioner": "flwr_datasets.partitioner"}
"""Packages of the classes that settings name in a mapping, where jsonargparse (4.53) finds no bare names."""

STAGES = ("fit", "validate", "test", "predict")
"""Prefixes of setting names in some messages."""

WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
    "list": "a list",
    "dict": "a mapping",
    "Iterable": "a list",
    "Sequence": "a list",
    "timedelta": "a duration",
}
"""Names of types for users."""


def explain(message: str, command: str, roots: Mapping[str, type]) -> str:
    """Rephrase an error message in one line.

    Args:
        message: message of jsonargparse.
        command: the command, such as `flow-pl fit`.
        roots: classes whose arguments the settings are, by the first part of their option names.

    Returns:
        The shortened message, with the nearest known name and where all names are listed.
    """
    lines = [line.strip().removeprefix("- ") for line in _first_attempt(message) if line.strip()]
    keys, owner = _place(lines)
    setting, text = ".".join(keys), " ".join(lines)
    asked = NO_HELP.fullmatch(message)
    if asked is not None:
        keys, owner = asked[1].split("."), ""
        return _no_class(keys, owner, asked[2], command, roots) or brief(message)
    option = OPTION.search(text)
    if option is not None and "class_path" in option.groups():
        return f"{setting} has settings other than class_path and init_args: expected only those two."
    if option is not None:
        return _no_setting(setting, option[1] or option[2] or option[3], text, owner, command, roots)
    required = next((found[1] for found in map(REQUIRED.search, lines) if found is not None), None)
    if required is not None:
        return _missing(setting, required, owner)
    if setting and "is abstract" in text:
        return f"{setting} has settings but no class_path: add their class. `{command} --help` lists some."
    mapping = NO_MAPPING.search(text)
    if mapping is not None:
        path, whole = f"{setting}.{mapping[1]}", "{class_path: ..., init_args: ...}"
        return f"{path}.class_path cannot be set alone: set all of it, as in --{path}='{whole}'."
    expected = [found for found in map(EXPECTED.search, lines) if found is not None and "a path but" not in found[0]]
    no_class = NO_CLASS.search("\n".join(lines)) or NO_PATH.search("\n".join(lines))
    if setting and no_class is not None:
        said = _bare_name(keys, no_class[1] or "", text) or _no_class(keys, owner, no_class[1] or "", command, roots)
        if said:
            return said
        expected = [found for found in expected if "dot import path" not in found[0]]
    values = [found[2] or "" for found in expected if GOT in found[0]]
    values += [found[1] or "" for found in map(VALUE.search, lines) if found is not None]
    if setting and expected and values:
        return _wrong_value(setting, values[0].partition(". Got value: ")[0], expected)
    made = NOT_MADE.search(text)
    if setting and made is not None and (missing := _missing_module(made[1] or made[3])):
        return f"{setting} is {made[1] or made[3]}, but {missing}"
    if setting and made is not None:
        return brief(f"{setting} is {made[1] or made[3]}, which cannot be used: {(made[2] or made[4]).strip()}")
    return brief(message)


def class_names(cls: type, argument: str = "") -> list[str]:
    """Return the names of this project's classes for an argument of a class; without an argument, of its subclasses.

    Args:
        cls: the class.
        argument: name of one of its arguments.

    Returns:
        The names of the concrete classes, sorted.
    """
    own = __name__.partition(".")[0]
    bases = set(_classes(_annotation(cls, argument))) if argument else {cls}
    found = {each for base in bases for each in _subclasses(base) if not inspect.isabstract(each)}
    return sorted({each.__name__ for each in found if each.__module__.partition(".")[0] == own and _public(each)})


def _public(cls: type) -> bool:
    """Return whether a package exports the class."""
    packages = (sys.modules.get(cls.__module__.rsplit(".", level)[0]) for level in range(cls.__module__.count(".") + 1))
    return any(cls.__name__ in getattr(package, "__all__", ()) for package in packages)


def _first_attempt(message: str) -> Iterator[str]:
    """Yield the lines, except those on base classes, which are tried after the requested class has failed."""
    depth, inside = None, True
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        if CLASS.search(line) is not None and "Problem with" in line:
            if depth is None:
                depth = indent
            elif indent <= depth:
                inside = False
        elif depth is not None and indent <= depth:
            inside = True
        if inside:
            yield line


def _place(lines: list[str]) -> tuple[list[str], str]:
    """Return the path of the setting and the class path of its object, from the first reason given."""
    keys: list[str] = []
    owner = ""
    for line in lines:
        key, cls = KEY.search(line), CLASS.search(line)
        if key is not None:
            keys += [part for part in key[1].split(".") if part != "init_args"]
        elif cls is not None:
            owner = cls[1]
        if any(pattern.search(line) for pattern in (OPTION, REQUIRED, NO_CLASS, EXPECTED, VALUE)):
            break
    return keys, owner


def _no_setting(setting: str, name: str, text: str, owner: str, command: str, roots: Mapping[str, type]) -> str:
    """Describe a setting that an object or a section does not accept."""
    listed = f"`{command} --help` lists them."
    if not owner:
        group = GROUP.search(text)
        path = f"{group[1] if group else setting}.{name}" if group or setting else name
        section, *names = [part for part in path.split(".") if part not in STAGES]
        if section in roots and names:
            return f"{section} has no setting {names[0]}.{nearest(names[0], _parameters(roots[section]))} {listed}"
        return f"there is no setting {section}.{nearest(section, [*roots, 'seed_everything', 'ckpt_path'])} {listed}"
    cls = CLASS.findall(text)
    owner = cls[-1] if "expects a function or a callable class" in text and cls else owner
    names = _parameters(_resolve(owner))
    help_option = f"--{setting}.help {_short(owner)}"
    where = f"`{command} {help_option}` lists them." if setting.count(".") <= 1 else f"It has {', '.join(names)}."
    return f"{setting} ({_short(owner)}) has no setting {name}.{nearest(name, names)} {where}"


def _missing(setting: str, names: str, owner: str) -> str:
    """Describe missing settings, which have no default."""
    if not setting:
        stripped = ", ".join(name.strip().partition(".")[2] for name in names.split(","))
        return f"{stripped} must be set: give a task and a method, such as -c task/digits -c method/flow."
    inside = ", ".join(f"{setting}.{name.strip()}" for name in names.split(","))
    names = names.rstrip(".")
    return f"{setting}{f' ({_short(owner)})' if owner else ''} needs {names}: set {inside}."


def _bare_name(keys: list[str], value: str, text: str) -> str:
    """Describe a bare class name in a mapping, where the full path is needed; empty if the value is in none."""
    name = next((name for name, path in MAPPING.findall(text) if path == value), "")
    if name not in PACKAGES:
        return ""
    return f"{'.'.join([*keys, name])} is {value}, expected the full path of a class: {PACKAGES[name]}.{value}."


def _no_class(keys: list[str], owner: str, value: str, command: str, roots: Mapping[str, type]) -> str:
    """Describe a value that names no class; empty if the possible classes are unknown."""
    cls: Any = _resolve(owner) if owner else roots.get(keys[0])
    known = [] if cls is None else _names(cls, keys[-1] if owner or len(keys) > 1 else "")
    if not known:
        return ""
    setting = ".".join(keys)
    if missing := _missing_module(value):
        return f"{setting} is {value}, but {missing}"
    if value in known:
        return f"{setting} is {value}, the name of several classes: give the full path of one."
    listed = f"Known are {', '.join(known)}." if len(known) <= 40 else f"`{command} --help all` lists them."
    return f"{setting} is {value or 'empty'}, which names no class.{nearest(_short(value), known)} {listed}"


def _missing_module(path: str) -> str:
    """Describe the module or package of a class path that cannot be found; empty if it can, or the path has no dot."""
    top, dot, _ = path.partition(".")
    with contextlib.suppress(ValueError):  # of a module without a specification, which is there
        if dot and top.isidentifier() and importlib.util.find_spec(top) is None:
            return (
                f"no module {top} is found: start with `python -m flow_pl`, which finds the modules of the current "
                "folder, or install it."
            )
    return ""


def _wrong_value(setting: str, value: str, expected: list[re.Match[str]]) -> str:
    """Describe a value of a wrong type."""
    words: dict[str, None] = {}
    for found in expected:
        words |= dict.fromkeys(_words(found[1]))
    null = " (null is null in YAML)" if value == "None" and "null" in words else ""
    *first, last = words
    choices = f"{', '.join(first)} or {last}" if first else last
    nested = NESTED.match(value)
    if nested is not None:
        return brief(f"{setting} has no settings of its own, such as {nested[1]}: expected {choices}{null}.")
    return brief(f"{setting} is {value or 'empty'}, expected {choices}{null}.")


def _words(kind: str) -> Iterator[str]:
    """Yield the names of a type, or its choices, for users."""
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", kind)
    cls = re.fullmatch(r"<class '(.+)'>", kind)
    if choices is not None:
        yield from (choice.strip().strip("'") for choice in choices[1].split(","))
    elif cls is not None:
        yield WORDS.get(_short(cls[1]), _short(cls[1]))
    else:
        yield kind.rstrip(".")


def _parameters(cls: Any) -> list[str]:
    """Return the parameter names of a class or function, including those of base classes."""
    if cls is None:
        return []
    with contextlib.suppress(Exception):  # inspecting a user's class may raise anything
        parser = ArgumentParser()
        add = parser.add_class_arguments if isinstance(cls, type) else parser.add_function_arguments
        return list(dict.fromkeys(name.partition(".")[0] for name in add(cls, fail_untyped=False)))
    return []


def _names(cls: Any, argument: str) -> list[str]:
    """Return the names of the imported classes for an argument of a class, or of its subclasses."""
    bases = set(_classes(_annotation(cls, argument))) if argument else {cls}
    found = {each for base in bases for each in _subclasses(base)}
    return sorted({each.__name__ for each in found if not (each.__name__.startswith("_") or inspect.isabstract(each))})


def _annotation(cls: Any, name: str) -> Any:
    """Return the type of an argument of the class, or of the base class that receives it."""
    for base in inspect.getmro(cls) if isinstance(cls, type) else (cls,):
        with contextlib.suppress(Exception):
            hints = typing.get_type_hints(base.__init__ if isinstance(base, type) else base)  # type: ignore[misc]
            if name in hints:
                return hints[name]
    return None


def _classes(annotation: Any) -> Iterator[type]:
    """Yield the classes in a type, except those of plain values; for a callable, those that it returns."""
    # Python 3.10 takes `Mapping[str, int]` for a class
    plain = isinstance(annotation, type) and typing.get_origin(annotation) is None
    if plain and annotation.__module__ != "builtins" and annotation is not Tensor:
        yield annotation
    # the parameters of a callable are a list among its arguments
    for part in typing.get_args(annotation):
        if not isinstance(part, list):
            yield from _classes(part)


def _subclasses(base: type) -> Iterator[type]:
    below: list[type] = type.__subclasses__(base)
    for cls in below:
        yield cls
        yield from _subclasses(cls)
    yield base


def _resolve(path: str) -> Any:
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        return pkgutil.resolve_name(path)
    return None


def _short(path: str) -> str:
    return path.rpartition(".")[2]
