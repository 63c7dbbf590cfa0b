"""Packages that only some data modules and commands need."""

from __future__ import annotations

import importlib
from typing import Any

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
            f'{needed_by} needs {module.partition(".")[0]} ({error}): pip install "flow-pl[{extra}]"'
        ) from error
