"""Logistic regression: the convex case, and the model of tag prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn


class LogisticRegression(nn.Sequential):
    """One linear block on the flattened features.

    Args:
        in_features: number of features of an example, or their shape.
        num_classes: number of classes.
    """

    def __init__(self, in_features: int | Sequence[int], num_classes: int) -> None:
        size = in_features if isinstance(in_features, int) else math.prod(in_features)
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", nn.Linear(size, num_classes))
