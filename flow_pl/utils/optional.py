"""Packages that only some data modules and commands need."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from packaging.requirements import Requirement

from flow_pl.errors import ConfigurationError


def import_optional(module: str, extra: str, needed_by: str = "this data") -> Any:
    """Import a module that the core does not depend on.

    Args:
        module: full name of the module.
        extra: the group of this project's optional dependencies that installs it.
        needed_by: what needs it, for the message.

    Returns:
        The module.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"{needed_by} needs {module.partition('.')[0]} ({error}): {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The command that installs the packages of an optional group, whose names an index knows today.

    Args:
        extra: the group.

    Returns:
        The command, and the name of the group.
    """
    try:
        required = [Requirement(each) for each in importlib.metadata.requires("flow-pl") or ()]
    except importlib.metadata.PackageNotFoundError:  # the source tree is on the path, and not installed
        required = []
    # those without a marker are the core's
    asked = [each for each in required if each.marker is not None and each.marker.evaluate({"extra": extra})]
    packages = [f'"{each.name}{each.specifier}"' for each in asked]
    if not packages:
        return f'pip install ".[{extra}]" in the folder of the project'
    return f"pip install {' '.join(packages)} (the extra {extra} of flow-pl)"
