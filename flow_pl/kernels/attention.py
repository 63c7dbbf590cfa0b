"""Attention of many clients at once.

Torch's fused attention on a CPU has no rule for vmap: it runs client by client, with a warning. Forward and backward of
10 clients with 20 pictures each, in one thread of an AMD EPYC (median of 15):

| heads, tokens, width of a head | fused, client by client | written out, side by side | fused, one batch of 200 |
|---|---|---|---|
| 4, 50, 16 | 32.8 ms | 17.5 ms | 16.4 ms |
| 4, 17, 32 | 12.6 ms | 8.1 ms | 4.9 ms |
| 12, 32, 32 (16 sentences each) | 66.6 ms | 34.2 ms | 24.9 ms |

So side by side it is written out, which also has derivatives of any order; a client alone keeps the fused one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    drop: Callable[[Tensor, float], Tensor] = functional.dropout,
) -> Tensor:
    """As `torch.nn.functional.scaled_dot_product_attention`: softmax(q k^T / sqrt(E) + mask) v.

    A query that may look nowhere gets zeros, as from torch's.

    Args:
        query: [..., heads, T, E].
        key: [..., heads, S, E].
        value: [..., heads, S, V].
        attn_mask: [..., T, S], broadcast; bool (True is looked at) or added to the scores.
        dropout_p: share of the weights that are dropped.
        is_causal: whether a query looks at the keys up to its own place alone.
        scale: of the scores; None = 1 / sqrt(E).
        enable_gqa: whether several heads of the query share one of key and value.
        drop: drops a share of the weights.

    Returns:
        [..., heads, T, V].
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        blocked = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.isneginf()
        added = scores if attn_mask.dtype == torch.bool else scores + attn_mask
        # not minus infinity, of which a whole row would make gradients that are no numbers
        weights = added.masked_fill(blocked, torch.finfo(added.dtype).min).softmax(-1).masked_fill(blocked, 0)
    return (drop(weights, dropout_p) if dropout_p else weights) @ value


open_attention: Callable[..., Any] = FunctionType(
    functional.multi_head_attention_forward.__code__,
    # it would ask for a replacement of itself again, and without that none of what it calls is replaced
    {**functional.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    functional.multi_head_attention_forward.__name__,
    functional.multi_head_attention_forward.__defaults__,
)
"""`multi_head_attention_forward`, within which the functions that it calls can be replaced."""
