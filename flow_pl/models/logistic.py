"""Logistic regression: the convex case, and the model of tag prediction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flow_pl.models.lazy import outputs
from flow_pl.utils.validation import given, require_count


class LogisticRegression(nn.Sequential):
    """One linear block on the flattened features.

    Args:
        in_features: number of features of an example, or their shape; null = those of the data.
        num_classes: number of classes; null = that of the data.
    """

    def __init__(self, in_features: int | Sequence[int] | None = None, num_classes: int | None = None) -> None:
        require_count(**given(num_classes=num_classes))
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", outputs(in_features, num_classes))
