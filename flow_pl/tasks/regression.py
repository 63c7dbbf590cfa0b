"""A real value for each example."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.tasks.base import Objective
from flow_pl.utils.validation import require_finite, require_positive


class Regression(Objective):
    """A real value for each example: mean squared error.

    Outputs [N] or [N, 1], y [N] float; NaN without a label. The model's outputs are standardized: a value is
    `mean + std * output`, and a step minimizes the mean squared error of the standardized values, so that learning
    rates do not depend on the unit of the labels.

    The loss in evaluation is the mean squared error, in the squared unit of the labels. The accuracy of this task is
    R², the coefficient of determination: 1 - MSE / std². It is 1 for exact predictions, 0 for the mean of the training
    labels, and below 0 for worse ones. Its variance is that of all training labels, for every client, so it is defined
    for a client with a single example, and its value over examples is their mean. It is undefined (NaN) for predictions
    that are not finite numbers.

    Args:
        mean: mean of the training labels.
        std: standard deviation of the training labels.

    Raises:
        ConfigurationError: `mean` is not finite, or `std` not positive.
    """

    real_valued: ClassVar[bool] = True

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        require_finite(mean=mean)
        require_positive(std=std)
        self.mean = mean
        self.std = std

    @property
    def accuracy(self) -> str:
        """Return R²."""
        return "R²"

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Count every real example with a label."""
        return mask.bool() & ~y.isnan()

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the squared error of every example [N], in float32; 0 without a label, NaN for a NaN prediction."""
        known = ~y.isnan()
        # the label first: where() passes a gradient of 0 back, which times NaN would be NaN
        return (self.predictions(outputs) - y.where(known, 0.0)).square().where(known, 0.0)

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Compute the mean squared error of the standardized values; see `Objective.loss`."""
        return super().loss(outputs, y, mask) / self.std**2

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the value of every example [N], float32."""
        return self.in_unit(outputs.float()).reshape(outputs.shape[0])

    def in_unit(self, outputs: Tensor) -> Tensor:
        """Return outputs in the unit of the labels, in the given shape."""
        return self.mean + self.std * outputs

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the explained share of the variance for each label [N], at most 1; its mean is R².

        NaN where the squared error is not finite, as after a divergence.
        """
        explained = 1 - self.losses(outputs, y) / self.std**2
        return explained.where(explained.isfinite(), torch.nan)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Return the outputs: a mixture of models is the mean of their values."""
        return outputs.float()

    def outputs(self, probabilities: Tensor) -> Tensor:
        """Return the mixture."""
        return probabilities

    def label_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape of a single value; see `Objective.label_shape`."""
        return ()

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one output; see `Objective.check`."""
        if outputs.numel() != 1:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, regression expects [1, 1] "
                "or [1]: end the backbone with a linear block of one output (num_classes: 1)."
            )

    def check_labels(self, mean: float, std: float) -> None:
        """Check that the settings match the labels, within a tenth of the standard deviation.

        Args:
            mean: mean of the training labels.
            std: standard deviation of the training labels.

        Raises:
            ConfigurationError: the settings do not match the labels.
        """
        if abs(mean - self.mean) <= self.std / 10 and abs(std - self.std) <= self.std / 10:
            return
        raise ConfigurationError(
            f"the training labels have mean {mean:.6g} and standard deviation {std:.6g}, but the task has mean "
            f"{self.mean:.6g} and std {self.std:.6g}: set model.objective.init_args.mean to {mean:.6g} and "
            f"model.objective.init_args.std to {std:.6g}."
        )
