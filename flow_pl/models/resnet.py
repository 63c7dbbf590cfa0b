"""ResNet-18 (He et al., CVPR 2016) with group normalization (Wu and He, ECCV 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from flow_pl.errors import ConfigurationError
from flow_pl.models.lazy import outputs
from flow_pl.utils.validation import given, require_count


class ResNet18(nn.Sequential):
    """Six routed blocks: stem, four stages of two residual blocks each, head.

    11,181,642 parameters for 10 classes and 11,227,812 for 100. Input [N, channels, height, width]. Batch
    normalization would keep running statistics, which clients trained side by side cannot share.

    Args:
        num_classes: number of classes; null = that of the data.
        in_channels: channels of an image; null = those of the data.
        groups: groups of each normalization; divides 64.

    Raises:
        ConfigurationError: `groups` does not divide 64.
    """

    def __init__(self, num_classes: int | None = 10, in_channels: int | None = 3, groups: int = 32) -> None:
        require_count(groups=groups, **given(num_classes=num_classes, in_channels=in_channels))
        if 64 % groups:
            raise ConfigurationError(f"groups is {groups}, expected a divisor of 64, such as 32 or 2.")
        super().__init__()
        first_layer = (
            nn.LazyConv2d(64, 7, stride=2, padding=3, bias=False)
            if in_channels is None
            else nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        )
        stem = nn.Sequential(
            first_layer,
            nn.GroupNorm(groups, 64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.add_module("stem", stem)
        widths = (64, 64, 128, 256, 512)
        for stage in range(1, 5):
            before, width = widths[stage - 1], widths[stage]
            first = ResidualBlock(before, width, stride=1 if stage == 1 else 2, groups=groups)
            self.add_module(f"stage{stage}", nn.Sequential(first, ResidualBlock(width, width, 1, groups)))
        self.add_module("pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("head", outputs(512, num_classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalization, added to their input.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution; if it is not 1, or the channels change, the input is convolved 1x1.
        groups: groups of each normalization.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.GroupNorm(groups, out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs [N, out_channels, H / stride, W / stride] for x [N, in_channels, H, W]."""
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        outputs: Tensor = (h + self.shortcut(x)).relu()
        return outputs
