"""Several labels for each example."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.errors import ConfigurationError
from flow_pl.tasks.base import Objective
from flow_pl.tasks.classification import check_classes
from flow_pl.utils.validation import require_choice, require_count


class MultiLabel(Objective):
    """Several labels per example: binary cross-entropy of each, measured by recall at k.

    Outputs [N, labels], y [N, labels] in {0, 1}. The accuracy of this task is recall@k: the share of true labels that
    are among the k most probable ones. It ignores examples without a label, which have nothing to recall; the loss is
    over every label of every example, including absent ones.

    Args:
        k: number of labels predicted for an example (published for Stack Overflow tags: 5).
        reduction: what a client's step minimizes: "sum" over the labels and examples of a minibatch (published
            for Stack Overflow tags), or "mean" over both. For 32 examples of 500 labels the sum's gradient is 16,000
            times the mean's, so each needs its own learning rates and regularization weights. Losses in evaluation are
            means for both.

    Raises:
        ConfigurationError: `k` is not positive, or `reduction` is neither of the two.
    """

    several_labels: ClassVar[bool] = True

    def __init__(self, k: int = 5, reduction: Literal["mean", "sum"] = "mean") -> None:
        require_count(k=k)
        require_choice(("mean", "sum"), reduction=reduction)
        self.k = k
        self.reduction = reduction

    @property
    def accuracy(self) -> str:
        """Return recall at k."""
        return f"recall@{self.k}"

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Count the true labels of real examples [N, labels]."""
        return mask.bool().unsqueeze(-1) & (y > 0)

    def in_loss(self, y: Tensor, mask: Tensor) -> Tensor:
        """Select all labels of real examples [N, labels], true or not."""
        return mask.bool().unsqueeze(-1) & (y >= 0)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the binary cross-entropy of every label [N, labels], in float32."""
        scores = outputs.float()
        return functional.softplus(scores) - scores * y

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Compute the sum or mean over all labels of real examples; see `Objective.loss`."""
        if self.reduction == "mean":
            return super().loss(outputs, y, mask)
        # selected, not multiplied by 0: a padded row's values must not reach the sum
        return self.losses(outputs, y).where(self.in_loss(y, mask), 0.0).sum()

    def loss_weight(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return the number of labels of real examples for a sum; see `Objective.loss_weight`."""
        if self.reduction == "mean":
            return super().loss_weight(y, mask)
        return self.in_loss(y, mask).float().sum()

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the k most probable labels [N, k], the most probable first."""
        return outputs.topk(self.k, dim=-1).indices

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return which labels are true and among the k most probable [N, labels]."""
        chosen = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, self.predictions(outputs), True)
        return chosen & (y > 0)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Compute the probability of each label [N, labels]."""
        return outputs.float().sigmoid()

    def outputs(self, probabilities: Tensor) -> Tensor:
        """Compute the log-odds of each label [N, labels]; see `Objective.outputs`."""
        kind = torch.finfo(probabilities.dtype)
        return probabilities.clamp_min(kind.tiny).log() - (-probabilities).clamp_min(kind.eps - 1).log1p()

    def label_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Return a label for each output; see `Objective.label_shape`."""
        return tuple(outputs.shape[1:])

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per label; see `Objective.check`."""
        if outputs.ndim != 2:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, multi-label prediction "
                "expects [1, labels]: end the backbone with a flatten and a linear block."
            )
        if outputs.shape[1] < self.k:
            raise ConfigurationError(
                f"k is {self.k}, but the backbone has {outputs.shape[1]} outputs, one for each label: set "
                "objective.k to that or less."
            )
        check_classes(outputs.shape[1], num_classes)
