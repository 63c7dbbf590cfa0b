"""Layers whose sizes come from the data, and are known only once it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from flow_pl.models.sizes import flat_size


class LazyClasses(nn.LazyLinear):
    """Create a linear layer with an output for each class of the data; becomes an `nn.Linear` when it is first called.

    `FederatedModule` sets `out_features` before that.
    """

    cls_to_become = nn.Linear

    def __init__(self) -> None:
        super().__init__(out_features=0)

    def initialize_parameters(self, *args: Any) -> None:
        """Take the number of inputs from the first call.

        Raises:
            RuntimeError: the number of classes is not known yet.
        """
        if self.has_uninitialized_params() and self.out_features < 1:
            raise RuntimeError("the number of classes is not known yet: give the backbone num_classes")
        super().initialize_parameters(*args)
        self.out_features = len(self.weight)


def inputs(in_features: int | Sequence[int] | None, out_features: int) -> nn.Linear:
    """Create a linear layer on an example's features.

    Args:
        in_features: number of features, or their shape; None = that of the first instance.
        out_features: number of outputs.
    """
    return nn.LazyLinear(out_features) if in_features is None else nn.Linear(flat_size(in_features), out_features)


def outputs(in_features: int | Sequence[int] | None, num_classes: int | None) -> nn.Linear:
    """Create a linear layer with an output for each class.

    Args:
        in_features: number of features, or their shape; None = that of the first instance.
        num_classes: number of classes; None = that of the data.
    """
    return LazyClasses() if num_classes is None else inputs(in_features, num_classes)


def set_classes(modules: Iterable[nn.Module], num_classes: int) -> None:
    """Set the number of classes in layers that have an output for each class.

    Args:
        modules: backbones.
        num_classes: number of classes of the data.
    """
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, LazyClasses):
                layer.out_features = num_classes
