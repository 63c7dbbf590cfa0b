"""Check settings; errors name the setting, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from flow_pl.errors import ConfigurationError


def given(**values: Any) -> dict[str, Any]:
    """Return the settings that are given, to check optional ones.

    Args:
        **values: settings by name.

    Returns:
        Those that are not None.
    """
    return {name: value for name, value in values.items() if value is not None}


def require_finite(**values: float) -> None:
    """Check that every value is a finite number.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is NaN, infinite, or not a number.
    """
    _require(values, lambda value: True, "a finite number")


def require_positive(**values: float) -> None:
    """Check that every value is greater than zero, and finite.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is invalid.
    """
    _require(values, lambda value: value > 0, "a number greater than 0")


def require_at_least_zero(**values: float) -> None:
    """Check that no value is negative, and all are finite.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is invalid.
    """
    _require(values, lambda value: value >= 0, "0 or more")


def require_fraction(**values: float) -> None:
    """Check that every value lies in [0, 1).

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is negative, 1 or more.
    """
    _require(values, lambda value: 0 <= value < 1, "a share of at least 0 and less than 1")


def require_share(**values: float) -> None:
    """Check that every value lies in [0, 1].

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is negative or more than 1.
    """
    _require(values, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def require_count(least: int = 1, /, **values: int) -> None:
    """Check that every value is a whole number and large enough.

    Args:
        least: the smallest one allowed.
        **values: settings by name.

    Raises:
        ConfigurationError: a value is invalid.
    """
    _require(values, lambda value: isinstance(value, Integral) and value >= least, f"a whole number of {least} or more")


def require_counts(least: int = 1, /, **values: Sequence[int]) -> None:
    """Check that every value is a list of whole numbers, each of them large enough; see `require_count`.

    Args:
        least: the smallest number allowed.
        **values: settings by name; an empty list passes.

    Raises:
        ConfigurationError: a value is invalid.
    """
    for name, numbers in values.items():
        if isinstance(numbers, str) or not isinstance(numbers, Sequence):
            raise ConfigurationError(f"{name} is {numbers}, expected a list of whole numbers.")
        require_count(least, **{f"{name}[{i}]": number for i, number in enumerate(numbers)})


def require_some(**values: Sequence[object]) -> None:
    """Check that no list or text is empty.

    Args:
        **values: settings by name.

    Raises:
        ConfigurationError: a value is empty.
    """
    for name, value in values.items():
        if not len(value):
            raise ConfigurationError(f"{name} is {value!r}, expected at least one entry.")


def require_choice(choices: Sequence[str], /, **values: str) -> None:
    """Check that every value is one of the choices.

    Args:
        choices: the allowed values.
        **values: settings by name.

    Raises:
        ConfigurationError: a value is not among them.
    """
    for name, value in values.items():
        if value not in choices:
            raise ConfigurationError(f"{name} is {value}, expected {' or '.join(map(repr, choices))}.")


def _require(values: Mapping[str, float], valid: Callable[[float], bool], expected: str) -> None:
    for name, value in values.items():
        if not (isinstance(value, Real) and -math.inf < value < math.inf and valid(value)):
            raise ConfigurationError(f"{name} is {value}, expected {expected}.")
