"""Layers whose sizes are those of the data, which are known only when it is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from flow_pl.models.sizes import flat_size


class LazyClasses(nn.LazyLinear):
    """A linear layer with an output for each class of the data; becomes an `nn.Linear` when it is first called.

    `FederatedModule` sets `out_features` before that.
    """

    cls_to_become = nn.Linear

    def __init__(self) -> None:
        super().__init__(out_features=0)

    def initialize_parameters(self, *args: Any) -> None:
        """Take the number of inputs from the first ones.

        Raises:
            RuntimeError: the number of classes is not known yet.
        """
        if self.has_uninitialized_params() and self.out_features < 1:
            raise RuntimeError("the number of classes is not known yet: give the backbone num_classes")
        super().initialize_parameters(*args)
        self.out_features = len(self.weight)


def inputs(in_features: int | Sequence[int] | None, out_features: int) -> nn.Linear:
    """A linear layer on an example's features.

    Args:
        in_features: number of features, or their shape; None = as many as the first instance has.
        out_features: number of outputs.
    """
    return nn.LazyLinear(out_features) if in_features is None else nn.Linear(flat_size(in_features), out_features)


def outputs(in_features: int | Sequence[int] | None, num_classes: int | None) -> nn.Linear:
    """A linear layer with an output for each class.

    Args:
        in_features: number of features, or their shape; None = as many as the first instance has.
        num_classes: number of classes; None = as many as the data has.
    """
    return LazyClasses() if num_classes is None else inputs(in_features, num_classes)


def set_classes(modules: Iterable[nn.Module], num_classes: int) -> None:
    """Tell the layers that have an output for each class how many there are.

    Args:
        modules: backbones.
        num_classes: number of classes of the data.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, LazyClasses):
                layer.out_features = num_classes
