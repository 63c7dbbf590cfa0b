"""What a model is trained for: the loss and what counts as correct, for one client's examples.

Written for one client without a client axis; the federated loop vectorises it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError, DataError


class Objective(ABC):
    """A task: loss, correctness and predictions from a model's outputs.

    Shapes: outputs [N, ...], y [N] or [N, T], mask [N] (1 = real example). `counted` tells which targets enter a
    loss or an accuracy; padding never does.
    """

    @abstractmethod
    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Which targets count: bool, in the shape of the targets."""

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Loss of every target, in the shape of the targets."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Tensor:
        """The predicted target of every example, int64."""

    @abstractmethod
    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check that a model's outputs for one example fit the data.

        Args:
            outputs: [1, ...] of the backbone.
            num_classes: number of classes of the data.

        Raises:
            ConfigurationError: the backbone cannot predict the data's targets.
        """

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Mean loss over the targets that count; 0 where there is none."""
        weight = self.counted(y, mask).to(torch.float32)
        return (self.losses(outputs, y) * weight).sum() / weight.sum().clamp_min(1.0)

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Whether each target is predicted right: bool, in the shape of the targets."""
        return self.predictions(outputs) == y

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Class probabilities of every target [..., classes]."""
        return outputs.float().softmax(-1)


class Classification(Objective):
    """One label per example: cross-entropy over classes.

    Outputs [N, classes], y [N] int64 in 0..classes-1.
    """

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Every real example counts."""
        return mask.bool()

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of every example [N], in float32."""
        # By hand: under vmap, cross_entropy(reduction="none") adds five kernels for its ignore_index.
        return -outputs.float().log_softmax(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The most probable class [N]."""
        return outputs.argmax(-1)

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per class; see `Objective.check`."""
        if outputs.ndim != 2:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, classification expects "
                "[1, classes]: end the backbone with a flatten and a linear block."
            )
        if outputs.shape[1] < num_classes:
            raise DataError(
                f"labels run from 0 to {num_classes - 1} but the backbone has {outputs.shape[1]} outputs: "
                f"give it {num_classes} classes."
            )


__all__ = ["Classification", "Objective"]
