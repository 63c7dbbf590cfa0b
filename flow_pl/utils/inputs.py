"""Handle model inputs: one tensor, or a mapping of several (such as token ids and their mask)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
S = TypeVar("S")

Inputs = Tensor | dict[str, Tensor]
"""Instances [N, ...]: one tensor, or several by name with the same leading axes; models receive a mapping as it is."""


def map_inputs(fn: Callable[[T], S], x: T | dict[str, T]) -> S | dict[str, S]:
    """Apply a function to the tensor, or to each of a mapping's.

    Args:
        fn: function of one tensor or array.
        x: instances.

    Returns:
        The result, or the results by name in the same order.
    """
    if isinstance(x, dict):
        return {name: fn(each) for name, each in x.items()}
    return fn(x)


def in_order(x: T | dict[str, T]) -> T | dict[str, T]:
    """Return instances with the names of a mapping in alphabetical order, in which they are stored and exported."""
    return {name: x[name] for name in sorted(x)} if isinstance(x, dict) else x


def take(x: T | dict[str, T], index: Any) -> T | dict[str, T]:
    """Index the tensor, or each of a mapping's: `x[index]`."""
    return map_inputs(lambda each: each[index], x)  # type: ignore[index]


def zip_inputs(fn: Callable[..., S], x: T | dict[str, T], *others: T | dict[str, T]) -> S | dict[str, S]:
    """Apply a function of several tensors, such as `torch.where`, name by name.

    Args:
        fn: function of as many tensors or arrays as there are instances.
        x: instances.
        *others: more instances with the same names.

    Returns:
        The result, or the results by name in the order of the first.
    """
    if isinstance(x, dict):
        return {name: fn(each, *(other[name] for other in others)) for name, each in x.items()}  # type: ignore[index]
    return fn(x, *others)


def leaves(x: T | dict[str, T]) -> list[T]:
    """Return the tensors in their order: one, or those of a mapping."""
    return list(x.values()) if isinstance(x, dict) else [x]


def names_of(x: T | dict[str, T]) -> tuple[str, ...] | None:
    """Return the names of a mapping's tensors; None for one tensor."""
    return tuple(x) if isinstance(x, dict) else None


def from_leaves(names: tuple[str, ...] | None, tensors: Iterable[T]) -> T | dict[str, T]:
    """Reassemble instances from their `names_of` and `leaves`."""
    if names is None:
        (one,) = tensors
        return one
    return dict(zip(names, tensors, strict=True))


def first(x: T | dict[str, T]) -> T:
    """Return the tensor, or the first of a mapping: all have the same number of instances, and device."""
    return next(iter(x.values())) if isinstance(x, dict) else x


def described(x: Inputs) -> str:
    """Describe instances [N, ...] for a message: shape and type of one instance, by name for a mapping."""
    if isinstance(x, dict):
        return ", ".join(f"{name} {list(t.shape[1:])} ({t.dtype})" for name, t in x.items())
    return f"{list(x.shape[1:])} ({x.dtype})"
