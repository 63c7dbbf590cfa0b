"""Compute norms of clients' updates and gradients, and scale them down to a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flow_pl.utils.groups import Groups, client_rows


def group_norms(difference: Groups) -> Tensor:
    """Compute the L2 norm of each client's update of each shared group.

    Args:
        difference: the clients' updates, by group and name [C, ...].

    Returns:
        [groups, C] the norms.
    """
    norms = [
        torch.stack([torch.linalg.vector_norm(client_rows(p), dim=1) for p in group.values()])
        for group in difference.values()
    ]
    return torch.stack([torch.linalg.vector_norm(group, dim=0) for group in norms])


def shrink_factors(norms: Tensor, bounds: float | Tensor) -> Tensor:
    """Compute factors of at most 1 that reduce norms to their bounds; in the shape of `norms`."""
    return (bounds / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)


def scaled_weights(weights: Mapping[str, Tensor], factors: Tensor) -> dict[str, Tensor]:
    """Multiply the clients' weights, [C] by group, by factors [C] or [groups, C]."""
    rows = factors.expand(len(weights), -1)
    return {name: weight * row for (name, weight), row in zip(weights.items(), rows, strict=True)}


def clipped(grads: Sequence[Tensor], bound: float) -> list[Tensor]:
    """Clip each client's gradient to a norm, as `torch.nn.utils.clip_grad_norm_` does for a single one.

    Args:
        grads: gradients [A, ...] of the tensors that a step updates.
        bound: largest L2 norm of a client's gradient.
    """
    norms = torch.stack([torch.linalg.vector_norm(client_rows(g), dim=1) for g in grads])
    norms = torch.linalg.vector_norm(norms, dim=0)
    factors = shrink_factors(norms, bound)
    return [g * factors.view(-1, *[1] * (g.ndim - 1)) for g in grads]
