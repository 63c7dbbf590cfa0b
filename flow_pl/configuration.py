"""Objects of a configuration that was saved: class paths are looked at before anything is made of them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from flow_pl.checks import check_class_paths
from flow_pl.errors import ConfigurationError, FlowError, brief, find_cause
from flow_pl.results.run_folder import CONFIG

T = TypeVar("T")

SECTIONS = ("seed_everything", "trainer", "data", "model")
"""What makes a run; the other settings are a command's own (a checkpoint, say)."""

KEY = "configuration"
"""Key of a run's settings in its checkpoints; absent where the run was set up in Python."""


def make(cls: type[T], settings: Mapping[str, Any], given: Mapping[str, Any]) -> T:
    """An object as a configuration says, but for arguments that are given.

    Args:
        cls: its class.
        settings: the arguments by name, with `class_path` and `init_args` where they are objects.
        given: arguments that take the place of those.

    Raises:
        ConfigurationError: an argument is missing or not valid, or a class path names no class of the kind expected.
    """
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "object", fail_untyped=False, instantiate=False, skip=set(given))
    try:
        parsed = parser.parse_object({"object": {key: value for key, value in settings.items() if key not in given}})
        check_class_paths(parsed)
        arguments = parser.instantiate_classes(parsed).get("object")
        return cls(**{**(vars(arguments) if arguments else {}), **given})
    except argparse.ArgumentError as error:
        raise ConfigurationError(f"the settings of {cls.__name__} cannot be used: {error}") from error
    except Exception as error:
        cause = find_cause(error, FlowError)
        if cause is None:
            raise
        raise cause from None


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file that a run has saved.

    Raises:
        ConfigurationError: it is not there, or holds none.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read as the settings of a run: {brief(error)}.") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ConfigurationError(f"{path} has no section 'model': give the {CONFIG} that a run has saved.")
    return settings


def flatten(settings: Any, name: str = "") -> dict[str, Any]:
    """Settings by the names of their options, as in `model.method.init_args.alpha`; lists are kept whole."""
    if not isinstance(settings, Mapping):
        return {name: settings}
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flatten(value, f"{name}.{key}" if name else str(key))
    return found
