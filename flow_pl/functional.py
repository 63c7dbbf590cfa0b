"""Modules called under parameters that are not their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call(module: nn.Module, parameters: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a module under the given parameters.

    No two of them are one (`RoutedModel` refuses such backbones); that is not looked for anew at every step.
    """
    return functional_call(module, parameters, args, tie_weights=False)
