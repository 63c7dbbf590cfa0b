"""Look up embeddings of many clients at once, with a padding row that is not trained.

Torch's vmap rule concatenates the clients' tables and then masks the gradient of the first table's padding row only
(torch 2.13).
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
    """Look up embeddings like `torch.nn.functional.embedding`; the padding row gets no gradient of any client."""
    if padding_idx is None:
        return functional.embedding(input, weight, None, *args, **kwargs)
    if not -len(weight) <= padding_idx < len(weight):
        return functional.embedding(input, weight, padding_idx, *args, **kwargs)  # torch raises the error
    rows = functional.embedding(input, weight, None, *args, **kwargs)
    padding = (input == padding_idx % len(weight)).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


def raw_embedding(weight: Tensor, indices: Tensor, padding_idx: int = -1, *args: Any, **kwargs: Any) -> Tensor:
    """Look up embeddings like `torch.embedding`, where a negative `padding_idx` means none; see `embedding`."""
    rows = torch.embedding(weight, indices, -1, *args, **kwargs)
    if padding_idx < 0:
        return rows
    return torch.where((indices == padding_idx).unsqueeze(-1), rows.detach(), rows)
