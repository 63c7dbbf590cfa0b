"""One label for each example."""

from __future__ import annotations

from torch import Tensor

from flow_pl.errors import ConfigurationError, DataError
from flow_pl.kernels import cross_entropy as kernels
from flow_pl.tasks.base import Objective


class Classification(Objective):
    """One label per example: cross-entropy over classes.

    Outputs [N, classes], y [N] int64 in 0..classes-1.
    """

    def counted(self, y: Tensor, mask: Tensor) -> Tensor:
        """Count every real example."""
        return mask.bool()

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the cross-entropy of every example [N], in float32."""
        return cross_entropy(outputs, y)

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return the most probable class [N]."""
        return outputs.argmax(-1)

    def check(self, outputs: Tensor, num_classes: int) -> None:
        """Check for one score per class; see `Objective.check`."""
        if outputs.ndim != 2:
            raise ConfigurationError(
                f"the backbone's outputs for one example have shape {list(outputs.shape)}, classification expects "
                "[1, classes]: end the backbone with a flatten and a linear block."
            )
        check_classes(outputs.shape[1], num_classes)


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Compute the cross-entropy of every target, in the shape of the targets."""
    return kernels.cross_entropy(outputs.float(), y.clamp_min(0))


def check_classes(outputs: int, num_classes: int) -> None:
    """Check that there is an output for each class.

    Raises:
        DataError: there are too few.
    """
    if outputs < num_classes:
        raise DataError(
            f"labels run from 0 to {num_classes - 1} but the backbone has {outputs} outputs: "
            f"give it {num_classes} classes."
        )
