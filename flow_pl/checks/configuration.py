"""Check that a configuration calls only classes, and that method and backbone of a checkpoint match."""

from __future__ import annotations

import pkgutil
import typing
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from flow_pl.errors import ConfigurationError


def check_class_paths(settings: Any) -> None:
    """Check that a configuration calls only classes, or functions that create modules, optimizers or schedulers.

    Where a class is expected, jsonargparse refuses unrelated classes, but it calls any function (4.53).

    Args:
        settings: parsed but not instantiated settings: mappings, namespaces, lists and values.

    Raises:
        ConfigurationError: a class path names another function.
    """
    if isinstance(settings, list | tuple | set):
        for entry in settings:
            check_class_paths(entry)
        return
    if isinstance(settings, Namespace):
        settings = vars(settings)
    if not isinstance(settings, Mapping):
        return  # a value: an enumeration, a duration, a signal
    for entry in settings.values():
        check_class_paths(entry)
    path = settings.get("class_path")
    try:
        found = pkgutil.resolve_name(path) if isinstance(path, str) and "." in path else nn.Module
    except (ImportError, AttributeError, ValueError):  # refused later, when it is instantiated
        return
    if not isinstance(found, type):
        try:
            made = typing.get_type_hints(found).get("return")
        except Exception:  # resolving an annotation may raise anything
            made = None
        if not (isinstance(made, type) and issubclass(made, nn.Module | Optimizer | LRScheduler)):
            raise ConfigurationError(
                f"class_path is {path}, which is not a class: name one, or a function annotated to return a "
                "module, an optimizer or a scheduler."
            )


def check_checkpoint(
    saved: dict[str, str], expected: dict[str, str], saved_state: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Check that a checkpoint was written by the same method and backbone, with the same blocks.

    Args:
        saved: `FederatedModule.identity` in the checkpoint.
        expected: `FederatedModule.identity` of this run.
        saved_state: parameters in the checkpoint.
        state: parameters of this run.

    Raises:
        ConfigurationError: the two differ.
    """
    for role in dict.fromkeys((*expected, *saved)):
        name, before = expected.get(role, "none"), saved.get(role, "none")
        if before != name:
            by = "by" if role in ("method", "backbone") else "with"
            raise ConfigurationError(
                f"the checkpoint was written {by} the {role} {before}, this configuration has {name}: use the "
                f"configuration that the checkpoint was trained with, or another checkpoint."
            )
    missing, unknown = sorted(state.keys() - saved_state.keys()), sorted(saved_state.keys() - state.keys())
    other = [
        f"{key} {list(saved_state[key].shape)} instead of {list(p.shape)}"
        for key, p in state.items()
        if key in saved_state and not isinstance(p, nn.UninitializedParameter) and saved_state[key].shape != p.shape
    ]
    problems = [f"without {key}" for key in missing] + [f"with unknown {key}" for key in unknown] + other
    if problems:
        raise ConfigurationError(
            f"the checkpoint's {expected['backbone']} has different parameters than this configuration's: "
            f"{'; '.join(problems[:3])}{' ...' if len(problems) > 3 else ''}: use the sizes it was trained with."
        )
