"""Terms that several methods add to the task's loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flow_pl.utils.groups import Parameters

KERNEL_VARIANCES = (10.0, 15.0, 20.0, 50.0)
"""Variances of the Gaussian kernels in `maximum_mean_discrepancy`, as in FedCP."""


def half_squared_distance(a: Parameters, b: Parameters) -> Tensor:
    """Compute 1/2 ||a - b||^2 over the parameters of a, a scalar in float32."""
    return torch.stack([(p - b[name]).float().square().sum() for name, p in a.items()]).sum() / 2


def routing_regularizer(
    q: Tensor, mask: Tensor, epsilon: float = 1e-6, encourage: Literal["local", "global"] = "local"
) -> Tensor:
    """Average -log(q^2 + eps) over real instances (tokens, in sequences) and routed blocks.

    Keeps the router from collapsing onto the other branch.

    Args:
        q: probabilities [N, blocks, 2] or [N, T, blocks, 2], (global, local).
        mask: [N] or [N, T], 1 where the instance is real.
        epsilon: floor inside the logarithm (published: 1e-6).
        encourage: the branch whose probability is increased.
    """
    chosen = q[..., 1 if encourage == "local" else 0]
    per_instance = -(chosen.square() + epsilon).log().mean(-1)
    weight = mask.to(per_instance.dtype)
    return (per_instance * weight).sum() / weight.sum().clamp_min(1.0)


def maximum_mean_discrepancy(first: Tensor, second: Tensor, real: Tensor) -> Tensor:
    """Compute the squared maximum mean discrepancy of two samples (Gaussian kernels of variances 10, 15, 20, 50).

    Gretton et al., A Kernel Two-Sample Test (JMLR 2012), the biased estimate; a scalar in float32.

    Args:
        first: first sample [N, K].
        second: second sample [N, K].
        real: [N] bool, which rows of both count; the result is 0 if none does.
    """
    # padding values must not affect a distance
    x, y = (sample.float().where(real.unsqueeze(-1), 0.0) for sample in (first, second))
    weight = real.float() / real.sum().clamp_min(1)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        # not cdist: its gradient at a distance of zero is not finite
        squares = a.square().sum(-1)[:, None] + b.square().sum(-1)[None] - 2 * a @ b.T
        kernel = torch.stack([(squares / (-2 * variance)).exp() for variance in KERNEL_VARIANCES]).sum(0)
        return weight @ kernel @ weight

    # autocast would multiply in half precision, whose error is larger than the distances
    with torch.autocast(first.device.type, enabled=False):
        return mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
