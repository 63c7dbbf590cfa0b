"""What a model is trained for: the loss and what counts as correct, for one client's examples.

Written for one client without a client axis; the federated loop vectorises it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.errors import ConfigurationError, DataError, require_positive


class Objective(ABC):
    """A task: loss, correctness and predictions from a model's outputs.

    Shapes: outputs [N, ...], y [N] or [N, T], mask [N] (1 = real example). `counted` tells which targets enter a
    loss or an accuracy; padding never does.

    Attributes:
        per_instance: whether an example has one target, and so one row in a file of predictions.
    """

    per_instance: ClassVar[bool] = True

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
        return _cross_entropy(outputs, y)

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
        _check_classes(outputs.shape[1], num_classes)


class NextToken(Objective):
    """The next token at every position of a sequence: cross-entropy over the vocabulary.

    Outputs [N, T, tokens], y [N, T] int64. Padding counts nowhere; unknown words and the end of a sequence do.

    Args:
        padding: the target that marks padding.
    """

    per_instance: ClassVar[bool] = False

    def __init__(self, padding: int = 0) -> None:
        self.padding = padding

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Targets of real sequences that are not padding [N, T]."""
        return mask.bool().unsqueeze(-1) & (y != self.padding)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of every token [N, T], in float32."""
        return _cross_entropy(outputs, y)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The most probable token [N, T]."""
        return outputs.argmax(-1)

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per token at every position; see `Objective.check`."""
        if outputs.ndim != 3:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, next-token prediction "
                "expects [1, T, tokens]: use a language model, such as NextWordLSTM."
            )
        _check_classes(outputs.shape[2], num_classes)


class MultiLabel(Objective):
    """Several labels per example: binary cross-entropy of each, measured by recall at k.

    Outputs [N, labels], y [N, labels] in {0, 1}. An accuracy of this task is recall@k: the share of true labels that
    are among the k most probable ones. Examples without a label have nothing to recall and count nowhere.

    Args:
        k: how many labels are predicted for an example (published for Stack Overflow tags: 5).
    """

    per_instance: ClassVar[bool] = False

    def __init__(self, k: int = 5) -> None:
        require_positive(k=k)
        self.k = k

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Mean over real examples and all labels, the absent ones too."""
        weight = mask.to(torch.float32)
        return (self.losses(outputs, y).mean(-1) * weight).sum() / weight.sum().clamp_min(1.0)

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """The true labels of real examples [N, labels]."""
        return mask.bool().unsqueeze(-1) & (y > 0)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy of every label [N, labels], in float32."""
        scores = outputs.float()
        return functional.softplus(scores) - scores * y

    def predictions(self, outputs: Tensor) -> Tensor:
        """The k most probable labels [N, k]."""
        return outputs.topk(self.k, dim=-1).indices

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Which labels are true and among the k most probable [N, labels]."""
        chosen = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, self.predictions(outputs), True)
        return chosen & (y > 0)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The probability of each label [N, labels]."""
        return outputs.float().sigmoid()

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per label; see `Objective.check`."""
        if outputs.ndim != 2:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, multi-label prediction "
                "expects [1, labels]: end the backbone with a flatten and a linear block."
            )
        _check_classes(outputs.shape[1], num_classes)


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every target, in the shape of the targets."""
    # By hand: under vmap, cross_entropy(reduction="none") adds five kernels for its ignore_index.
    return -outputs.float().log_softmax(-1).gather(-1, y.clamp_min(0).unsqueeze(-1)).squeeze(-1)


def _check_classes(outputs: int, num_classes: int) -> None:
    if outputs < num_classes:
        raise DataError(
            f"labels run from 0 to {num_classes - 1} but the backbone has {outputs} outputs: "
            f"give it {num_classes} classes."
        )


__all__ = ["Classification", "MultiLabel", "NextToken", "Objective"]
