"""Compute the recurrence of an LSTM for many clients at once, with a hand-written backward pass.

Autograd through the steps computes the gradient of the recurrent weights as one outer product, as large as the weights,
per step; here one matrix product over all steps replaces them. Under vmap all clients run in one batched product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flow_pl.errors import FlowError
from flow_pl.kernels.functional import mapped_first


def recur(gates: Tensor, weight: Tensor) -> Tensor:
    """Compute the hidden states of an LSTM with zero initial state.

    Args:
        gates: contribution of the inputs to the gates [T, C, N, 4 H], in torch's order: input, forget, cell, output.
        weight: recurrent weights [C, 4 H, H] of C clients; vmap extends the client axis.

    Returns:
        The hidden states [T, C, N, H].
    """
    return _apply(gates, weight)[0]


class _Recurrence(torch.autograd.Function):
    """`recur`; also returns the gates [T, C, N, 4 H], tanh(c) and c [T, C, N, H] for the backward pass."""

    @staticmethod
    def forward(gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Run the steps."""
        steps, hidden = gates.shape[0], weight.shape[-1]
        active = gates.clone()
        c = gates.new_empty(*gates.shape[:-1], hidden)
        tanh_c, h = torch.empty_like(c), torch.empty_like(c)
        transposed = weight.transpose(1, 2)
        with torch.autocast(gates.device.type, enabled=False):
            for t in range(steps):
                if t:
                    active[t].baddbmm_(h[t - 1], transposed)
                i, f, g, o = active[t].chunk(4, dim=-1)
                active[t, ..., : 2 * hidden].sigmoid_()
                g.tanh_()
                o.sigmoid_()
                c[t].copy_(i * g)
                if t:
                    c[t].addcmul_(f, c[t - 1])
                tanh_c[t].copy_(c[t].tanh())
                h[t].copy_(o * tanh_c[t])
        return h, active, tanh_c, c

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Save the tensors that the backward pass needs."""
        h, active, tanh_c, c = output
        ctx.mark_non_differentiable(active, tanh_c, c)
        ctx.save_for_backward(h, active, tanh_c, c, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the gradients of the gates' inputs and of the recurrent weights."""
        wanted = ctx.needs_input_grad[1]
        delta, of_weight = _Pullback.apply(grad, *ctx.saved_tensors, wanted)  # type: ignore[no-untyped-call]
        return delta, of_weight if wanted else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], gates: Tensor, weight: Tensor) -> tuple[Any, Any]:
        """Merge the mapped axis into the client axis."""
        size = info.batch_size
        gates = mapped_first(gates, in_dims[0], size).movedim(0, 1)  # [T, size, C, N, 4 H]
        weight = mapped_first(weight, in_dims[1], size)  # [size, C, 4 H, H]
        outputs = _apply(gates.flatten(1, 2), weight.flatten(0, 1))
        return tuple(out.view(len(out), size, weight.shape[1], *out.shape[2:]) for out in outputs), (1,) * 4


class _Pullback(torch.autograd.Function):
    """The backward pass of `recur`, which has no derivative itself."""

    @staticmethod
    def forward(
        grad: Tensor, h: Tensor, active: Tensor, tanh_c: Tensor, c: Tensor, weight: Tensor, wanted: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the steps backward; the second gradient is empty if it is not wanted."""
        steps, clients, _, hidden = h.shape
        delta = torch.empty_like(active)
        later: Tensor | None = None  # gradient of c from the next time step
        with torch.autocast(grad.device.type, enabled=False):
            for t in range(steps - 1, -1, -1):
                i, f, g, o = active[t].chunk(4, dim=-1)
                of_h = grad[t] if t == steps - 1 else torch.baddbmm(grad[t], delta[t + 1], weight)
                of_c = of_h * o * (1 - tanh_c[t] * tanh_c[t])
                if later is not None:
                    of_c = of_c + later
                of_f = of_c * c[t - 1] * f * (1 - f) if t else torch.zeros_like(of_c)
                pieces = (of_c * g * i * (1 - i), of_f, of_c * i * (1 - g * g), of_h * tanh_c[t] * o * (1 - o))
                delta[t].copy_(torch.cat(pieces, dim=-1))
                later = of_c * f
            if not wanted:
                return delta, weight.new_empty(clients, 0)
            gates = delta[1:].permute(1, 3, 0, 2).reshape(clients, 4 * hidden, -1)
            return delta, gates @ h[:-1].transpose(0, 1).reshape(clients, -1, hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Refuse: the saved tensors are constants here, so a second derivative would be wrong.

        Raises:
            FlowError: always.
        """
        raise FlowError(
            "an LSTM has no second derivatives here: use a first-order version of the method, or a recurrent module of "
            "your own."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        """Merge the mapped axis into the client axis, the first of the weights and the second of all others."""
        size = info.batch_size
        *mapped, weight = (mapped_first(t, dim, size) for t, dim in zip(inputs[:-1], in_dims[:-1], strict=True))
        merged = (t.movedim(0, 1).flatten(1, 2) for t in mapped)
        delta, of_weight = _Pullback.apply(*merged, weight.flatten(0, 1), inputs[-1])  # type: ignore[no-untyped-call]
        split = (size, weight.shape[1])
        return (delta.view(len(delta), *split, *delta.shape[2:]), of_weight.view(*split, *of_weight.shape[1:])), (1, 0)


def _apply(gates: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _Recurrence.apply(gates, weight)  # type: ignore[no-untyped-call]
    return outputs
