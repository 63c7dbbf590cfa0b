"""The next token at every position of a sequence."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from flow_pl.errors import ConfigurationError
from flow_pl.tasks.base import Objective
from flow_pl.tasks.classification import check_classes, cross_entropy
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_counts


class NextToken(Objective):
    """Prediction of the next token at every position: cross-entropy over the vocabulary.

    Outputs [N, T, tokens], y [N, T] int64. Padding never counts, nor does a position without a label (-1). Unknown
    words and the end of a sequence count; a second accuracy leaves them out, as the Stack Overflow benchmark of
    TensorFlow Federated does.

    Args:
        padding: target that marks padding.
        special_tokens: targets excluded from the second accuracy besides padding: unknown words (oov) and the end of a
            sequence (eos); empty = no second accuracy.
    """

    positions: ClassVar[tuple[str, ...]] = ("position",)

    def __init__(self, padding: int = 0, special_tokens: tuple[int, ...] = (1, 3)) -> None:
        require_count(0, padding=padding)
        require_counts(0, special_tokens=special_tokens)
        self.padding = padding
        self.special_tokens = tuple(special_tokens)
        self.subset = "without_oov_eos" if self.special_tokens else ""

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Count the targets of real sequences that are not padding [N, T]."""
        return mask.bool().unsqueeze(-1) & (y != self.padding) & (y >= 0)

    def in_subset(self, y: Tensor) -> Tensor | None:
        """Select the targets that are not special tokens [N, T]."""
        if not self.special_tokens:
            return None
        return torch.stack([y != token for token in self.special_tokens]).all(0)

    def to_predict(self, x: Inputs, y: Tensor, mask: Tensor) -> Tensor:
        """Select the positions of real sequences that are not padding [N, T], with or without a label."""
        real = y != self.padding
        if isinstance(x, Tensor) and x.shape == y.shape:
            real = real & ((y >= 0) | (x != self.padding))
        return mask.bool().unsqueeze(-1) & real

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the cross-entropy of every token [N, T], in float32."""
        return cross_entropy(outputs, y)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the most probable token [N, T]."""
        return outputs.argmax(-1)

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per token at every position; see `Objective.check`."""
        if outputs.ndim != 3:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, next-token prediction "
                "expects [1, T, tokens]: use a language model, such as NextWordLSTM."
            )
        check_classes(outputs.shape[2], num_classes)
