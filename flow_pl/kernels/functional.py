"""Modules called under parameters that are not their own, and operations of our own under vmap."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call(module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a module under the given parameters.

    No two of them are one (`RoutedModel` refuses such backbones); that is not looked for anew at every step.
    """
    return functional_call(module, parameters, args, tie_weights=False)


def mapped_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor in a vmap rule with its mapped axis, of the given size, first; one not mapped is seen by all."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
