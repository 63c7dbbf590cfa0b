"""Terms that several methods add to the task's loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flow_pl.utils.groups import Parameters


def half_squared_distance(a: Parameters, b: Parameters) -> Tensor:
    """1/2 ||a - b||^2 over the parameters of a, a scalar in float32."""
    return torch.stack([(p - b[name]).float().square().sum() for name, p in a.items()]).sum() / 2


def routing_regularizer(
    q: Tensor, mask: Tensor, epsilon: float = 1e-6, encourage: Literal["local", "global"] = "local"
) -> Tensor:
    """Mean over real instances (tokens, in sequences) and routed blocks of -log(q^2 + eps).

    Keeps the router from collapsing onto the other path.

    Args:
        q: probabilities [N, blocks, 2] or [N, T, blocks, 2], (global, local).
        mask: [N] or [N, T], 1 where the instance is real.
        epsilon: floor inside the logarithm (published: 1e-6).
        encourage: which probability is pushed up.
    """
    chosen = q[..., 1 if encourage == "local" else 0]
    per_instance = -(chosen.square() + epsilon).log().mean(-1)
    weight = mask.to(per_instance.dtype)
    return (per_instance * weight).sum() / weight.sum().clamp_min(1.0)
