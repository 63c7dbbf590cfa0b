"""Norms of clients' updates, over all of what a client sends, and of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flow_pl.utils.groups import Groups


def group_norms(difference: Groups) -> Tensor:
    """L2 norm of each client's update of each shared group.

    Args:
        difference: the clients' updates, by group and name [C, ...].

    Returns:
        [groups, C].
    """
    norms = [
        torch.stack([torch.linalg.vector_norm(p.flatten(1), dim=1) for p in group.values()])
        for group in difference.values()
    ]
    return torch.stack([torch.linalg.vector_norm(group, dim=0) for group in norms])


def shrink_factors(norms: Tensor, bounds: float | Tensor) -> Tensor:
    """Factors, at most 1, that bring norms down to a bound; of the shape of `norms`."""
    return (bounds / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


def scaled_weights(weights: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """The clients' weights by group [C], times factors [C] or [groups, C]."""
    rows = factors.expand(len(weights), -1)
    return {name: weight * row for (name, weight), row in zip(weights.items(), rows, strict=True)}


def clipped(grads: Sequence[Tensor], bound: float) -> list[Tensor]:
    """Gradients of many clients, each scaled down to a norm; as `torch.nn.utils.clip_grad_norm_` of each of them.

    Args:
        grads: of the tensors that a step moves [A, ...].
        bound: largest L2 norm of a client's gradient.
    """
    norms = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]), dim=0)
    factors = shrink_factors(norms, bound)
    return [g * factors.view(-1, *[1] * (g.ndim - 1)) for g in grads]
