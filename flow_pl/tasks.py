"""Tasks: define the loss and what counts as correct, for one client's examples.

Written for one client without a client axis; the federated loop vectorises it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from flow_pl.errors import ConfigurationError, DataError
from flow_pl.utils.validation import require_choice, require_count, require_counts


class Objective(ABC):
    """Defines a task: loss, correctness and predictions from a model's outputs.

    Shapes: outputs [N, ...], y [N] or [N, T], mask [N] (1 = real example). Padding enters no loss and no accuracy.

    Attributes:
        subset: for a task with a second accuracy, over those of its counted targets that `in_subset` picks: what the
            names of its metrics end on; empty for a task with one accuracy.
        positions: where an example is predicted position by position, the names of these axes, which lie behind that of
            the examples; a file of predictions has a row for each position.
        several_labels: whether an example has several labels, as zeros and ones, and several are predicted.
    """

    subset: str = ""
    positions: ClassVar[tuple[str, ...]] = ()
    several_labels: ClassVar[bool] = False

    @abstractmethod
    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return which targets count in an accuracy: bool, in the shape of the targets."""

    def in_subset(self, y: Tensor) -> Tensor | None:
        """Return which counted targets the second accuracy covers, in their shape; None if there is none."""
        return None

    def in_loss(self, y: Tensor, mask: Tensor) -> Tensor:
        """Return which targets the loss averages over: bool, in their shape; by default those that count."""
        return self.counted(y, mask)

    def to_predict(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Return where to predict, with or without a label: bool [N, *positions]."""
        return mask.bool()

    @abstractmethod
    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the loss of every target, in the shape of the targets."""

    @abstractmethod
    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the predicted target of every example, int64."""

    @abstractmethod
    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check that a model's outputs for one example fit the data.

        Args:
            outputs: [1, ...] of the backbone.
            num_classes: number of classes of the data.

        Raises:
            ConfigurationError: the backbone cannot predict the data's targets.
        """

    def label_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """Shape of an example's label for a model's outputs for one example [1, ...]; by default all but the scores."""
        return tuple(outputs.shape[1:-1])

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Average the losses over the targets of `in_loss`; 0 if there is none."""
        weight = self.in_loss(y, mask).to(torch.float32)
        return (self.losses(outputs, y) * weight).sum() / weight.sum().clamp_min(1.0)

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return whether each target is predicted correctly: bool, in the shape of the targets."""
        return self.predictions(outputs) == y

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Compute the class probabilities of every target [..., classes]."""
        return outputs.float().softmax(-1)

    def outputs(self, probabilities: Tensor) -> Tensor:
        """Convert probabilities of a mixture of models to outputs; finite even for probabilities of 0 or 1."""
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


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

    Outputs [N, T, tokens], y [N, T] int64. Padding never counts, nor does a position without a label (-1). Unknown
    words and the end of a sequence count; a second accuracy leaves them out, as the Stack Overflow benchmark of
    TensorFlow Federated does.

    Args:
        padding: the target that marks padding.
        special_tokens: targets that the second accuracy leaves out besides padding: unknown words (oov) and the end of
            a sequence (eos); none = no second accuracy.
    """

    positions: ClassVar[tuple[str, ...]] = ("position",)

    def __init__(self, padding: int = 0, special_tokens: tuple[int, ...] = (1, 3)) -> None:
        require_count(0, padding=padding)
        require_counts(0, special_tokens=special_tokens)
        self.padding = padding
        self.special_tokens = tuple(special_tokens)
        self.subset = "without_oov_eos" if self.special_tokens else ""

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Targets of real sequences that are not padding [N, T]."""
        return mask.bool().unsqueeze(-1) & (y != self.padding) & (y >= 0)

    def in_subset(self, y: Tensor) -> Tensor | None:
        """Targets that are no special token [N, T]."""
        if not self.special_tokens:
            return None
        return torch.stack([y != token for token in self.special_tokens]).all(0)

    def to_predict(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Positions of real sequences that are not padding [N, T]; without a label, the token read there tells."""
        real = y != self.padding
        if x.shape == y.shape:
            real = real & ((y >= 0) | (x != self.padding))
        return mask.bool().unsqueeze(-1) & real

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
    are among the k most probable ones. Examples without a label have nothing to recall and do not count in it; the
    loss is over every label of every example, the absent ones too.

    Args:
        k: how many labels are predicted for an example (published for Stack Overflow tags: 5).
        reduction: what a step of a client minimizes: "sum", over the labels and the examples of a minibatch (published
            for Stack Overflow tags), or "mean" over both. For 32 examples of 500 labels the sum's gradient is 16,000
            times the mean's, so each has learning rates and weights of a method's regulariser of its own. The losses
            of an evaluation are means for both.

    Raises:
        ConfigurationError: `k` is not positive, or `reduction` is neither of the two.
    """

    several_labels: ClassVar[bool] = True

    def __init__(self, k: int = 5, reduction: Literal["mean", "sum"] = "mean") -> None:
        require_count(k=k)
        require_choice(("mean", "sum"), reduction=reduction)
        self.k = k
        self.reduction = reduction

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """The true labels of real examples [N, labels]."""
        return mask.bool().unsqueeze(-1) & (y > 0)

    def in_loss(self, y: Tensor, mask: Tensor) -> Tensor:
        """All labels of real examples [N, labels], true or not."""
        return mask.bool().unsqueeze(-1) & (y >= 0)

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy of every label [N, labels], in float32."""
        scores = outputs.float()
        return functional.softplus(scores) - scores * y

    def loss(self, outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Sum or mean over all labels of real examples; see `Objective.loss`."""
        if self.reduction == "mean":
            return super().loss(outputs, y, mask)
        # selected, not multiplied by 0: a padded row's values must not reach the sum
        return self.losses(outputs, y).where(self.in_loss(y, mask), 0.0).sum()

    def predictions(self, outputs: Tensor) -> Tensor:
        """The k most probable labels [N, k], the most probable first."""
        return outputs.topk(self.k, dim=-1).indices

    def correct(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Which labels are true and among the k most probable [N, labels]."""
        chosen = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, self.predictions(outputs), True)
        return chosen & (y > 0)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """The probability of each label [N, labels]."""
        return outputs.float().sigmoid()

    def outputs(self, probabilities: Tensor) -> Tensor:
        """The log-odds of each label [N, labels]; see `Objective.outputs`."""
        kind = torch.finfo(probabilities.dtype)
        return probabilities.clamp_min(kind.tiny).log() - (-probabilities).clamp_min(kind.eps - 1).log1p()

    def label_shape(self, outputs: Tensor) -> tuple[int, ...]:
        """A zero or one for each output; see `Objective.label_shape`."""
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
