"""Compute normalization layers of many clients in single precision under autocast, also on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a normalization of `torch.nn.functional` that computes in float32 under autocast.

    Torch's rules for vmap multiply normalized half-precision values by float32 weights. The result has another type
    than autograd expects, so that a gradient within a step (PerFedAvg, Scaffold) would fail.
    """

    def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002  # torch's own name
        if torch.is_autocast_enabled(input.device.type) and input.dtype in (torch.bfloat16, torch.float16):
            input = input.float()  # noqa: A001
        return norm(input, *args, **kwargs)

    return call


NORMALIZATIONS = {
    norm: in_float32(norm) for norm in (functional.group_norm, functional.instance_norm, functional.layer_norm)
}
"""The replaced functions."""
