"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flow_pl.models.lazy import inputs, outputs
from flow_pl.utils.validation import given, require_count, require_counts


class MLP(nn.Sequential):
    """Linear blocks with ReLU between them, on the flattened features.

    Args:
        in_features: number of features of an example, or their shape; null = those of the data.
        num_classes: number of classes; null = that of the data.
        hidden: widths of the hidden layers; empty = a linear model.
    """

    def __init__(
        self,
        in_features: int | Sequence[int] | None = None,
        num_classes: int | None = None,
        hidden: Sequence[int] = (200,),
    ) -> None:
        require_count(**given(num_classes=num_classes))
        require_counts(hidden=hidden)
        widths = [in_features, *hidden]
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        for i, width in enumerate(hidden, start=1):
            self.add_module(f"linear{i}", inputs(widths[i - 1], width))
            self.add_module(f"relu{i}", nn.ReLU())
        self.add_module("head", outputs(widths[-1], num_classes))
