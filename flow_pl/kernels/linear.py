"""Compute linear layers of many clients at once, with gradients in the memory layout of the weights.

Torch's own gradient of a batch of weights is a transposed product. An optimizer then traverses memory in two orders,
which on a CPU takes longer than the product itself, and its `foreach` kernels fall back to one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flow_pl.kernels.attention import attention_of_clients, open_attention
from flow_pl.kernels.embedding import embedding, raw_embedding
from flow_pl.kernels.functional import mapped_first
from flow_pl.kernels.gru import gru_cell
from flow_pl.kernels.normalization import NORMALIZATIONS


class ClientLinears(TorchFunctionMode):
    """A context that replaces `torch.nn.functional.linear`, and so `torch.nn.Linear`, by the version of this module.

    It also replaces embeddings (`flow_pl.kernels.embedding`), attention (`flow_pl.kernels.attention`), normalization
    (`flow_pl.kernels.normalization`) and the cell of `torch.nn.GRUCell` (`flow_pl.kernels.gru`). The linear layers have
    reverse-mode derivatives of any order, but no forward-mode ones (`torch.func.jvp`).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace linear layers, embeddings, attention, normalization and GRU cells; pass everything else through."""
        if func is functional.multi_head_attention_forward:
            with self:  # the mode is inactive while it handles a function
                return open_attention(*args, **(kwargs or {}))
        return REPLACED.get(func, func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002  # torch's own name
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return functional.linear(input, weight, bias)  # not a layer's call
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight = _cast(input, dtype), _cast(weight, dtype)  # noqa: A001
        bias = None if bias is None else _cast(bias, dtype)
    return _apply(input, weight, bias)


REPLACED: Mapping[Callable[..., Any], Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: embedding,
    torch.embedding: raw_embedding,
    functional.scaled_dot_product_attention: attention_of_clients,
    **NORMALIZATIONS,
    torch.gru_cell: partial(gru_cell, linear=_linear),
}
"""The replaced functions."""


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor like torch's autocast, which leaves float64 and integers unchanged."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] or None to [..., out]; under vmap each with a leading client axis."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute one product for all clients."""
        rows = _rows(x, weight)
        if weight.ndim == 2:
            out = functional.linear(rows, weight, bias)
        elif bias is None:
            out = torch.bmm(rows, weight.mT)
        else:
            out = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)
        # not a view for autograd: later operations may change it in place
        shaped: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[-2]])
        return shaped

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        """Save the tensors that the backward pass needs."""
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed."""
        x, weight = ctx.saved_tensors
        product = torch.mm if weight.ndim == 2 else torch.bmm
        rows, needs = _rows(grad, weight), ctx.needs_input_grad
        return (
            product(rows, weight).view(x.shape) if needs[0] else None,
            product(rows.mT, _rows(x, weight)) if needs[1] else None,
            rows.sum(-2) if needs[2] else None,
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, int]:
        """Compute the products of all clients at once, each with its own weights."""
        size = info.batch_size
        x = mapped_first(x, in_dims[0], size)
        if in_dims[1] is None and weight.ndim == 2 and in_dims[2] is None:
            return functional.linear(x, weight, bias), 0  # a layer shared by all clients
        weight = mapped_first(weight, in_dims[1], size)
        bias = None if bias is None else mapped_first(bias, in_dims[2], size)
        if weight.ndim == 3:
            return _apply(x, weight, bias), 0
        # nested vmap: merge its axis into the client axis
        out = _apply(x.flatten(0, 1), weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1))
        return out.view(size, len(out) // size, *out.shape[1:]), 0


def _rows(t: Tensor, weight: Tensor) -> Tensor:
    """Reshape vectors [..., size] to the rows of a matrix, one matrix per client with its own weights."""
    clients = weight.shape[:-2]
    return t.reshape(*clients, math.prod(t.shape[len(clients) : -1]), t.shape[-1])


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out
