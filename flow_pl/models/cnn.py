"""The convolutional network of the EMNIST experiments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flow_pl.errors import ConfigurationError
from flow_pl.models.dropout import Dropout
from flow_pl.models.lazy import inputs, outputs
from flow_pl.utils.validation import given, require_count, require_counts, require_fraction


class EMNISTCNN(nn.Sequential):
    """Two 3x3 convolutions, pooling and two linear blocks; 1,206,590 parameters for 62 classes.

    Four blocks with parameters: conv1 (32), conv2 (64), linear (128), head. Input [N, channels, height, width].

    Args:
        num_classes: number of classes; null = that of the data.
        in_shape: channels, height and width of an image; null = those of the data.
        dropout: shares dropped after the pooling and after the linear block (published: 0.25 and 0.5).

    Raises:
        ConfigurationError: a size is not positive, an image too small for the layers, or a share is not in [0, 1).
    """

    def __init__(
        self,
        num_classes: int | None = 62,
        in_shape: Sequence[int] | None = (1, 28, 28),
        dropout: tuple[float, float] = (0.25, 0.5),
    ) -> None:
        require_count(**given(num_classes=num_classes))
        require_counts(**given(in_shape=in_shape))
        if in_shape is not None and (len(in_shape) != 3 or min(in_shape[1:]) < 6):
            raise ConfigurationError(
                f"in_shape is {list(in_shape)}, expected channels, height and width, with at least 6 pixels a side."
            )
        if len(dropout) != 2:
            raise ConfigurationError(f"dropout is {list(dropout)}, expected two shares.")
        require_fraction(**{f"dropout[{i}]": share for i, share in enumerate(dropout)})
        # two valid 3x3 convolutions take 4 pixels off each side length, the pooling halves the rest
        pooled = None if in_shape is None else 64 * ((in_shape[1] - 4) // 2) * ((in_shape[2] - 4) // 2)
        super().__init__()
        self.add_module("conv1", nn.LazyConv2d(32, 3) if in_shape is None else nn.Conv2d(in_shape[0], 32, 3))
        self.add_module("relu1", nn.ReLU())
        self.add_module("conv2", nn.Conv2d(32, 64, 3))
        self.add_module("relu2", nn.ReLU())
        self.add_module("pool", nn.MaxPool2d(2))
        self.add_module("dropout1", Dropout(dropout[0]))
        self.add_module("flatten", nn.Flatten())
        self.add_module("linear", inputs(pooled, 128))
        self.add_module("relu3", nn.ReLU())
        self.add_module("dropout2", Dropout(dropout[1]))
        self.add_module("head", outputs(128, num_classes))
