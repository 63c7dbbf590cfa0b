"""Pool features of tokens or positions to one vector per instance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flow_pl.utils.inputs import Inputs

MASK = "attention_mask"
"""Name of the tensor that is 1 for tokens and 0 for padding, among several inputs."""


def padding_token(backbone: nn.Module) -> int | None:
    """Return the padding token: the `padding_idx` of the backbone's first embedding table that has one."""
    tables = (module for module in backbone.modules() if isinstance(module, nn.Embedding))
    return next((table.padding_idx for table in tables if table.padding_idx is not None), None)


def token_mask(x: Inputs, padding: int | None) -> Tensor | None:
    """Return which tokens of instances are real.

    Args:
        x: instances: token ids [N, T], or several tensors by name, one of which may be the mask [N, T].
        padding: the padding token; None if unknown.

    Returns:
        [N, T] bool; None if nothing distinguishes padding.
    """
    if isinstance(x, dict):
        return x[MASK].bool() if MASK in x else None
    if padding is None or x.ndim != 2 or x.is_floating_point():
        return None
    return x.ne(padding)


def pooled(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Average over tokens, or over the positions of an image.

    Args:
        features: [N, F], tokens [N, T, F] or images [N, F, ...].
        mask: [N, T], 1 for the tokens that count; None = all. With another number of tokens than T, all count.

    Returns:
        [N, F]; zeros for an instance without a token that counts.
    """
    if features.ndim < 3:
        return features.reshape(features.shape[0], -1)
    if features.ndim > 3:
        return features.flatten(2).mean(2)
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(1)
    weight = mask.to(features.dtype).unsqueeze(-1)
    return (features * weight).sum(1) / weight.sum(1).clamp_min(1)


def is_tokens(x: Inputs) -> bool:
    """Return whether instances are token ids, or several tensors by name."""
    return isinstance(x, dict) or x.dtype in (torch.int64, torch.int32)
