"""Norms of clients' updates, over all of what a client sends."""

from __future__ import annotations

from collections.abc import Mapping

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
