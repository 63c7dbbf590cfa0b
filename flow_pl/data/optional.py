"""Packages that only some data modules need."""

from __future__ import annotations

import importlib
from typing import Any

from flow_pl.errors import ConfigurationError


def import_optional(module: str, extra: str) -> Any:
    """Import a module that the core does not depend on.

    Args:
        module: full name of the module.
        extra: the group of this project's optional dependencies that installs it.

    Returns:
        The module.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f'this data needs {module.partition(".")[0]} ({error}): pip install "flow-pl[{extra}]"'
        ) from error
