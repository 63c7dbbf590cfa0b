"""Embedding tables of many clients at once, each with a padding row that rests.

Torch's own rule for vmap puts the clients' tables behind one another and then masks the gradient of the padding row of
the first table alone (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def embedding(
    input: Tensor,  # noqa: A002  # torch's own name
    weight: Tensor,
    padding_idx: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """As `torch.nn.functional.embedding`, whose arguments these are; the padding row gets no gradient of any client."""
    if padding_idx is None:
        return functional.embedding(input, weight, None, *args, **kwargs)
    if not -len(weight) <= padding_idx < len(weight):
        return functional.embedding(input, weight, padding_idx, *args, **kwargs)  # torch says what is wrong
    rows = functional.embedding(input, weight, None, *args, **kwargs)
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


def raw_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    """As `torch.embedding`, for which a negative `padding_idx` is none; see `embedding`."""
    rows = torch.embedding(weight, indices, -1, *args, **kwargs)
    if padding_idx < 0:
        return rows
    return torch.where((indices == padding_idx).unsqueeze(-1), rows.detach(), rows)
