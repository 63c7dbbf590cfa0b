"""Import packages that only some data modules and commands need."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from typing import Any

from packaging.requirements import Requirement

from flow_pl.errors import ConfigurationError


def import_optional(module: str, extra: str, needed_by: str = "this data") -> Any:
    """Import a module that the core does not depend on.

    Args:
        module: full name of the module.
        extra: name of the group of optional dependencies that installs it.
        needed_by: the user of the module, for the message.

    Returns:
        The module.

    Raises:
        ConfigurationError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing(module, extra, needed_by, str(error)) from error


def require_installed(module: str, extra: str, needed_by: str) -> None:
    """Check that a module can be found, without importing it.

    Args:
        module: name of the module.
        extra: name of the group of optional dependencies that installs it.
        needed_by: the user of the module, for the message.

    Raises:
        ConfigurationError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise _missing(module, extra, needed_by, "it is not installed")


def _missing(module: str, extra: str, needed_by: str, reason: str) -> ConfigurationError:
    return ConfigurationError(f"{needed_by} needs {module.partition('.')[0]} ({reason}): {install_command(extra)}")


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an optional group.

    Args:
        extra: name of the group.

    Returns:
        The command, and the name of the group.
    """
    try:
        required = [Requirement(each) for each in importlib.metadata.requires("flow-pl") or ()]
    except importlib.metadata.PackageNotFoundError:  # the source tree is on the path but not installed
        required = []
    # requirements without a marker belong to the core
    asked = [each for each in required if each.marker is not None and each.marker.evaluate({"extra": extra})]
    steps = [f"{each.name} requires Python {bound} or newer" for each in required if (bound := _newer(each, extra))]
    if asked:
        steps.insert(0, "pip install " + " ".join(f'"{each.name}{each.specifier}"' for each in asked))
    if not steps:
        return f'pip install ".[{extra}]" in the folder of the project'
    return f"{'; '.join(steps)} (the extra {extra} of flow-pl)"


def _newer(required: Requirement, extra: str) -> str | None:
    """Return the lowest Python for a requirement of a group, None if this Python will do."""
    bound = re.search(r'python_version >= "([\d.]+)"', str(required.marker))
    if required.marker is None or bound is None or required.marker.evaluate({"extra": extra}):
        return None
    return bound[1] if required.marker.evaluate({"extra": extra, "python_version": bound[1]}) else None
