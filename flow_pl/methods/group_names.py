"""Name groups of parameters that a method refers to but that do not exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from flow_pl.errors import ConfigurationError
from flow_pl.methods.steps import Derive

if TYPE_CHECKING:
    from flow_pl.methods.base import Method


def check_groups(method: Method) -> None:
    """Check that every group that a bound method names exists.

    The groups created by a `Derive` are known only once it runs, so nothing after it is checked.

    Raises:
        ConfigurationError: a group does not exist; names the choices.
    """
    parameters = {group: dict(module.named_parameters()) for group, module in method.modules.items()}
    if any(isinstance(p, nn.UninitializedParameter) for group in parameters.values() for p in group.values()):
        return  # a client's first groups are known only once the data are
    server = {group: {key: parameters[group][key].detach() for key in keys} for group, keys in method.trained.items()}
    name = type(method).__name__
    try:
        known = tuple(method.start(server))
    except KeyError as error:
        (key,) = error.args or ("",)
        if not any(key in parameters for parameters in server.values()):  # some other key is missing, not a group
            require_group(server, f"{name}.start reads", str(key))
        raise
    for setting, groups, choices in (
        ("shared, of the server,", method.shared, tuple(method.modules)),
        ("private, at the start,", method.private, known),
    ):
        for group in groups:
            require_group(choices, f"{name}.{setting} names", group)
    for stages in (method.phases, method.personal_phases):
        made = list(known)
        for stage in stages:
            if isinstance(stage, Derive):
                break
            for step in stage.steps:
                require_group(made, f"a step of {name} moves", step.moves)
    if not any(isinstance(stage, Derive) for stage in method.phases):
        for setting, groups in (("shared", method.shared), ("private", method.private)):
            for group in groups.values():
                require_group(known, f"{name}.{setting} names", group)
        if method.participation is not None:
            require_group(known, f"{name}.participation names", method.participation)


@contextmanager
def naming_missing_groups(method: Method, groups: Mapping[str, Any]) -> Iterator[None]:
    """Name a missing group that a method reads within the context, with the choices.

    Args:
        method: method whose steps, `Derive`s or `predict` are called.
        groups: the client's groups, as they are when the error occurs.

    Raises:
        ConfigurationError: a group does not exist.
    """
    try:
        yield
    except KeyError as error:
        (key,) = error.args or ("",)
        parameters = (name for module in method.modules.values() for name, _ in module.named_parameters())
        if isinstance(key, str) and key not in parameters:  # otherwise a parameter is missing, not a group
            require_group(groups, f"{type(method).__name__} reads", key)
        raise


def require_group(choices: Iterable[str], where: str, group: str) -> None:
    """Check that a group is among the choices.

    Raises:
        ConfigurationError: the group is not among them.
    """
    choices = list(choices)
    if group not in choices:
        raise ConfigurationError(f"{where} the group '{group}', expected {' or '.join(map(repr, choices))}.")
