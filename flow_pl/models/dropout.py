"""Dropout by the random stream of a client's step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flow_pl.utils.counter_rng import ones_below
from flow_pl.utils.unit_stream import UnitStream, current_stream
from flow_pl.utils.validation import require_fraction


class Dropout(nn.Dropout):
    """Drops elements like `torch.nn.Dropout`; either depends on (seed, round, client, step, unit) alone.

    This one is faster for a client that is trained alone: torch's needs every function of the step to be intercepted.

    Args:
        p: share of the elements that are dropped.

    Raises:
        ConfigurationError: the share is not in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        require_fraction(p=p)
        super().__init__(p)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's own name
        """Drop elements in training, and scale up the rest."""
        stream = current_stream()
        if stream is None or not self.training or self.p == 0:
            return super().forward(input)
        return drop(stream, input, input.shape, self.p)


def drop(stream: UnitStream, input: Tensor, shape: Sequence[int], p: float, inplace: bool = False) -> Tensor:  # noqa: A002
    """Set a share of the elements to zero, and scale up the rest.

    Args:
        stream: source of the draws.
        input: tensor of any shape.
        shape: shape of the draws, broadcast to the input.
        p: share of the elements to drop, 0 to 1.
        inplace: whether the input is changed.
    """
    # by integers, since 16-bit floats have too few values to draw a share from
    mask = ones_below(stream.bits(shape), 1 - p).to(input.dtype)
    mask = mask.mul_(1 / (1 - p)) if p < 1 else torch.zeros_like(mask)
    return input.mul_(mask) if inplace else input * mask
