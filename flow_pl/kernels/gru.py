"""Compute the cell of a gated recurrent unit for many clients at once: torch's own runs client by client under vmap."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def gru_cell(
    input: Tensor,  # noqa: A002  # torch's own name
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Compute the next state from single operations, like `torch.gru_cell`.

    Args:
        input: [N, D] or [D].
        hx: the state [N, H] or [H].
        w_ih: weights of the inputs [3 H, D]: reset, update, new.
        w_hh: weights of the state [3 H, H].
        b_ih: biases [3 H]; None if there are none.
        b_hh: biases [3 H]; None if there are none.
        linear: computes the linear layers.

    Returns:
        The next state, in the shape of `hx`.
    """
    of_input, of_state = linear(input, w_ih, b_ih).chunk(3, -1), linear(hx, w_hh, b_hh).chunk(3, -1)
    reset, update = (a.add(b).sigmoid() for a, b in zip(of_input[:2], of_state[:2], strict=True))
    new = (of_input[2] + reset * of_state[2]).tanh()
    return new + update * (hx - new)
