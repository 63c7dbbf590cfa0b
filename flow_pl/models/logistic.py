"""Logistic regression: the convex case, and the model of tag prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flow_pl.models.sizes import flat_size
from flow_pl.utils.validation import require_count


class LogisticRegression(nn.Sequential):
    """One linear block on the flattened features.

    Args:
        in_features: number of features of an example, or their shape.
        num_classes: number of classes.
    """

    def __init__(self, in_features: int | Sequence[int], num_classes: int) -> None:
        require_count(num_classes=num_classes)
        size = flat_size(in_features)
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(size, num_classes))
