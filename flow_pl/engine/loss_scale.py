"""Scale the losses in float16 training (16-mixed); steps are skipped client by client."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GROWTH_INTERVAL = 100
"""Rounds without a skipped step after which the scale is doubled."""


class LossScale(nn.Module):
    """The factor on all clients' losses in a round; part of the checkpoint.

    Starts at 2^16 and is halved after a round in which a step was skipped, as torch.amp.GradScaler does step by
    step; within a round it is the same for all clients, so that a client's result does not depend on the others.
    """

    value: Tensor
    clean_rounds: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(2.0**16))
        self.register_buffer("clean_rounds", torch.tensor(0.0))

    @torch.no_grad()
    def adapt(self, skipped: Tensor) -> None:
        """Halve or double the scale after a round, without reading from the device.

        Args:
            skipped: number of client steps that were skipped because a gradient was not finite.
        """
        clean = skipped == 0
        self.clean_rounds.copy_(torch.where(clean, self.clean_rounds + 1, 0.0))
        grow = self.clean_rounds >= GROWTH_INTERVAL
        self.value.mul_(torch.where(clean, torch.where(grow, 2.0, 1.0), 0.5))
        self.clean_rounds.mul_(~grow)
