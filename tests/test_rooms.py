"""The house has one way down: each room uses only rooms below it, and no modules import each other in a circle."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "flow_pl"
ROOMS = (
    "__main__",
    "compare",
    "report_command",
    "deploy",
    "cli",
    "callbacks",
    "export_command",
    "export",
    "serving",
    "module",
    "resume",
    "configuration",
    "report",
    "checks",
    "evaluation",
    "engine",
    "methods",
    "models",
    "tasks",
    "data",
    "results",
    "shipped",
    "loggers",
    "kernels",
    "utils",
    "errors",
    "version",
)
"""From the top down. `callbacks` is the folder at the top level, installed as flow_pl.callbacks."""


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources():
    """Every module's file by its name; a link does not hide the callbacks."""
    paths = [path for path in PACKAGE.rglob("*.py") if "callbacks" not in path.parts]
    paths += (PACKAGE / "callbacks").glob("*.py")
    return {module_name(path): path for path in paths}


def imported(path, modules):
    """The project's modules that a file imports, wherever it does, but for typing alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            if name and name != "flow_pl":
                yield name


MODULES = sources()


@cache
def imports():
    """The project's modules that each module imports. Reading them takes seconds, so not when tests are collected."""
    return {name: set(imported(path, MODULES)) for name, path in MODULES.items()}


def room(module):
    return module.split(".")[1]


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES if module != "flow_pl"} <= set(ROOMS)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_uses_rooms_below_it_alone(name):
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        if module != "flow_pl" and room(module) == name
        for other in others
        if ROOMS.index(room(other)) < ROOMS.index(name)
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    # the names that a package offers are its modules'; the package itself imports them all
    graph = {module: others - {module} for module, others in imports().items() if MODULES[module].name != "__init__.py"}
    TopologicalSorter(graph).prepare()
