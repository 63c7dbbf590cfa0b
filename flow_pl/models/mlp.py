"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from flow_pl.models.sizes import flat_size
from flow_pl.utils.validation import require_count, require_counts


class MLP(nn.Sequential):
    """Linear blocks with ReLU between them, on the flattened features.

    Args:
        in_features: number of features of an example, or their shape.
        num_classes: number of classes.
        hidden: widths of the hidden layers; none = a linear model.
    """

    def __init__(self, in_features: int | Sequence[int], num_classes: int, hidden: Sequence[int] = (200,)) -> None:
        require_count(num_classes=num_classes)
        require_counts(hidden=hidden)
        widths = [flat_size(in_features), *hidden]
        super().__init__()
        self.add_module("flatten", nn.Flatten())
        for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            self.add_module(f"linear{i}", nn.Linear(fan_in, fan_out))
            self.add_module(f"relu{i}", nn.ReLU())
        self.add_module("head", nn.Linear(widths[-1], num_classes))
