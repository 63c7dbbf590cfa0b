"""Instantiate objects from a saved configuration; class paths are checked first."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from flow_pl.checks import check_class_paths
from flow_pl.errors import ConfigurationError, FlowError, brief, find_cause
from flow_pl.results.run_folder import CONFIG

T = TypeVar("T")

SECTIONS = ("seed_everything", "trainer", "data", "model")
"""Sections that define a run; other settings belong to a single command (such as a checkpoint)."""

KEY = "configuration"
"""Key of a run's settings in its checkpoints; absent if the run was set up in Python."""


def make(cls: type[T], settings: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    """Create an object from a configuration, with some arguments given directly.

    Args:
        cls: the class.
        settings: the arguments by name; objects have `class_path` and `init_args`.
        given: arguments that override those settings.

    Raises:
        ConfigurationError: an argument is missing or invalid, or a class path does not name a class of the expected
            type.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "object", fail_untyped=False, instantiate=False, skip=set(given))
    with clear_errors(f"the settings of {cls.__name__}"):
        parsed = parser.parse_object({"object": {key: value for key, value in settings.items() if key not in given}})
        check_class_paths(parsed)
        arguments = parser.instantiate_classes(parsed).get("object")
        return cls(**{**(vars(arguments) if arguments else {}), **given})


@contextlib.contextmanager
def clear_errors(named: str) -> Iterator[None]:
    """Raise what is wrong with a configuration as an error of this project.

    Args:
        named: what to call the configuration in its message.

    Raises:
        ConfigurationError: the parser rejects it.
        FlowError: a class that it names raised this error.
    """
    try:
        yield
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"{named} cannot be used: {error}") from error
    except Exception as error:
        cause = find_cause(error, FlowError)
        if cause is None:
            raise
        raise cause from None


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the settings in a file that a run has saved.

    Raises:
        ConfigurationError: the file is missing or holds no settings.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read as the settings of a run: {brief(error)}.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ConfigurationError(f"{path} has no section 'model': pass the {CONFIG} saved by a run.")
    return settings


def flatten(settings: Any, name: str = "") -> dict[str, Any]:
    """Flatten settings to option names, as in `model.method.init_args.alpha`; lists are kept whole."""
    if not isinstance(settings, Mapping):
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{name}.{key}" if name else str(key))
    return found
