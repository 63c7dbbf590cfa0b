"""The base class of tasks: the loss, the targets that count, and correctness, for one client's examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.utils.inputs import Inputs


class Objective(ABC):
    """Defines a task: loss, correctness and predictions from a model's outputs.

    Shapes: outputs [N, ...], y [N] or [N, T], mask [N] (1 = real example). Padding is excluded from loss and accuracy.

    Attributes:
        subset: for a task with a second accuracy, over the counted targets that `in_subset` selects: suffix of its
            metrics' names; empty for a task with one accuracy.
        positions: names of the axes after that of the examples if an example is predicted position by position; a file
            of predictions has a row for each position.
        several_labels: whether an example has several labels, as zeros and ones, of which several are predicted.
        real_valued: whether a label is a real value (NaN if there is none) rather than the number of a class.
    """

    subset: str = ""
    positions: ClassVar[tuple[str, ...]] = ()
    several_labels: ClassVar[bool] = False
    real_valued: ClassVar[bool] = False

    @property
    def accuracy(self) -> str:
        """Return the name of this task's accuracy for tables; empty if it is the share of correct predictions."""
        return ""

    @abstractmethod
    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return which targets count in an accuracy: bool, in the shape of the targets."""

    def in_subset(self, y: Tensor) -> Tensor | None:
        """Return which counted targets the second accuracy covers, in their shape; None if there is none."""
        return None

    def in_loss(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return which targets the loss averages over: bool, in their shape; by default those that count."""
        return self.counted(y, mask)

    def to_predict(self, x: Inputs, y: Tensor, mask: Tensor) -> Tensor:
        """Return where to predict, with or without a label: bool [N, *positions]."""
        return mask.bool()

    def decided(self, y: Tensor, mask: Tensor, shape: torch.Size) -> Tensor:
        """Return which routing decisions count.

        Args:
            y: targets [N] or [N, T].
            mask: [N], 1 for a real example.
            shape: of the decisions of a block: [N], or [N, T] if it is routed per token.

        Returns:
            bool, in that shape: with a target for each token, those that count; otherwise all tokens of real examples.
        """
        counted = self.counted(y, mask)
        if counted.shape == shape and not self.several_labels:
            return counted
        return mask.bool().reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of every target, in the shape of the targets."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the predicted target of every example, int64; float32 where targets are real values."""

    @abstractmethod
    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check that a model's outputs for one example fit the data.

        Args:
            outputs: [1, ...] of the backbone.
            num_classes: number of classes of the data.

        Raises:
            ConfigurationError: the backbone cannot predict the data's targets.
        """

    def check_labels(self, mean: float, std: float) -> None:  # noqa: B027  # most tasks have no such settings
        """Check settings that depend on the training labels, for a task with real values.

        Args:
            mean: of the training labels.
            std: standard deviation of the training labels.

        Raises:
            ConfigurationError: the settings do not match the labels.
        """

    def label_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return the shape of a label, given outputs for one example [1, ...]; by default without the scores' axis."""
        return tuple(outputs.shape[1:-1])

    def require_one_class(self, needs: str) -> None:
        """Check that a target is one class.

        Args:
            needs: what a method does with this class, and the remedy; the end of the message.

        Raises:
            ConfigurationError: it is several labels, or a real value.
        """
        if self.several_labels or self.real_valued:
            found = "several labels" if self.several_labels else "a real value"
            raise ConfigurationError(f"the task {type(self).__name__} has {found} for an example, {needs}")

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Average the losses over the targets of `in_loss`; 0 if there is none."""
        weight = self.in_loss(y, mask).to(torch.float32)
        return (self.losses(outputs, y) * weight).sum() / weight.sum().clamp_min(1.0)

    def loss_weight(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return the factor between the mean over the targets of `in_loss` and `loss`, a scalar; here 1."""
        return torch.ones((), device=mask.device)

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return whether each target is predicted correctly: bool, in the shape of the targets.

        For real-valued targets, a score of each instead, whose mean is the accuracy.
        """
        return self.predictions(outputs) == y

    def in_unit(self, outputs: Tensor) -> Tensor:
        """Return the outputs in the unit of the labels, as an exported program gives them; here unchanged."""
        return outputs

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Compute the class probabilities of every target [..., classes]; mixtures of models average them."""
        return outputs.float().softmax(-1)

    def outputs(self, probabilities: Tensor) -> Tensor:
        """Convert probabilities of a mixture of models to outputs; finite even for probabilities of 0 or 1.

        A task that overrides `probabilities`, or whose outputs are not a score for each class, overrides it, too:
        `predictions` of outputs(probabilities(scores)) must be those of the scores.
        """
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
