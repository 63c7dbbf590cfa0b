"""Replace a backbone's BatchNorm layers, so that clients can be trained side by side.

In training, a BatchNorm layer mixes the instances of a minibatch and writes running statistics, which would leak
between clients. Every replacement computes an instance's outputs from that instance alone, and writes nothing.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flow_pl.errors import ConfigurationError
from flow_pl.utils.validation import require_choice

BatchNorm = Literal["group", "frozen", "local"]
"""Replacements of BatchNorm layers; see `converted`."""

CHANNELS, GROUPS = 16, 32
"""Smallest number of channels in a group and largest number of groups: Wu and He, Group Normalization (ECCV 2018),
found 16 channels in a group best among fixed widths (Table 3), and 32 groups best among fixed numbers."""


class FixedBatchNorm(nn.Module):
    """Normalizes by constant statistics; the affine parameters are trained.

    Args:
        layer: BatchNorm layer whose parameters and statistics are used, under the same names.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.eps = layer.eps
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.register_buffer("running_mean", layer.running_mean.detach().clone())
        self.register_buffer("running_var", layer.running_var.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the channels of x [N, C, ...]."""
        return self.normalize(x, self.running_mean, self.running_var)

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalize x [N, C, ...] by mean and variance [C]."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


class ClientBatchNorm(FixedBatchNorm):
    """Normalizes by statistics of each client's own data; the affine parameters are the client's own, too (`FedBN`)."""


def converted(backbone: nn.Module, choice: BatchNorm) -> nn.Module:
    """Replace the BatchNorm layers of a backbone, in place.

    - "group": a GroupNorm with the same affine parameters, and as many groups of at least 16 channels as possible, up
      to 32; a single group for fewer channels.
    - "frozen": the running statistics as constants, also in training; the affine parameters are trained.
    - "local": the statistics of each client's own examples, for a method that keeps these layers on the client, such as
      `FedBN`.

    Args:
        backbone: any module.
        choice: the replacement.

    Returns:
        The backbone; the new layer, if it is a BatchNorm itself.

    Raises:
        ConfigurationError: there is no BatchNorm, or one that cannot be converted.
    """
    require_choice(("group", "frozen", "local"), batch_norm=choice)
    found = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, _BatchNorm)}
    if not found:
        raise ConfigurationError(
            f"batch_norm is {choice}, but {type(backbone).__name__} has no BatchNorm layer: leave it out."
        )
    for name, layer in found.items():
        new = _layer(f"block '{name}' ({type(layer).__name__}) of the backbone", layer, choice)
        new.train(layer.training)
        if not name:
            return new
        # an attribute of its owner, whatever kind of module that is
        owner, _, attribute = name.rpartition(".")
        backbone.get_submodule(owner)._modules[attribute] = new
    return backbone


def _layer(named: str, layer: _BatchNorm, choice: BatchNorm) -> nn.Module:
    if type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or not layer.num_features:
        raise ConfigurationError(
            f"{named} does more than nn.BatchNorm2d does, or has no shape yet, so batch_norm: {choice} cannot replace "
            "it: use another layer."
        )
    if choice == "group":
        groups = group_count(layer.num_features)
        norm = nn.GroupNorm(groups, layer.num_features, layer.eps, affine=False)
        norm.affine = layer.affine
        norm.weight, norm.bias = layer.weight, layer.bias
        return norm
    if layer.running_mean is None:
        raise ConfigurationError(
            f"{named} has no running statistics (track_running_stats=False), which batch_norm: {choice} starts from: "
            "use batch_norm: group."
        )
    return FixedBatchNorm(layer) if choice == "frozen" else ClientBatchNorm(layer)


def group_count(channels: int) -> int:
    """Return the number of groups for a number of channels.

    Args:
        channels: number of channels.
    """
    most = min(GROUPS, max(1, channels // CHANNELS))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def statistics_of(x: Tensor, mask: Tensor, empty: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of channels over the real instances, as BatchNorm does for a batch of these.

    Args:
        x: [N, C, ...] the inputs.
        mask: [N] bool, True for real instances.
        empty: mean and variance [C] for the case without real instances.

    Returns:
        Mean and variance [C], float32.
    """
    axes = [axis for axis in range(x.ndim) if axis != 1]
    real = mask.view(-1, *[1] * (x.ndim - 1))
    values = x.float().masked_fill(~real, 0)
    count = (mask.sum() * math.prod(x.shape[2:])).clamp_min(1)
    mean = values.sum(axes) / count
    shape = (1, -1, *[1] * (x.ndim - 2))
    var = (values - mean.view(shape)).masked_fill(~real, 0).square().sum(axes) / count
    some = mask.any()
    return torch.where(some, mean, empty[0]), torch.where(some, var, empty[1])
