"""Batch normalization where clients are trained side by side: what becomes of a backbone's BatchNorm layers.

In training a BatchNorm layer mixes the instances of a minibatch, and it writes running statistics that would go from
client to client. Each choice here gives an instance outputs of its own, and writes nothing.
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
"""What becomes of BatchNorm layers; see `converted`."""

CHANNELS, GROUPS = 16, 32
"""Least channels of a group and most groups: Wu and He, Group Normalization (ECCV 2018), found 16 channels in a group
best among fixed widths (Table 3), and 32 groups best among fixed numbers."""


class FixedBatchNorm(nn.Module):
    """Normalizes by statistics that are constants; the affine parameters are trained.

    Args:
        layer: whose parameters, statistics and names of both are taken over.
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
        """Outputs for x [N, C, ...], its channels normalized."""
        return self.normalize(x, self.running_mean, self.running_var)

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalize x [N, C, ...] by mean and variance [C]."""
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


class ClientBatchNorm(FixedBatchNorm):
    """Normalizes by statistics that each client has of its own data, with affine parameters of its own (`FedBN`)."""


def converted(backbone: nn.Module, choice: BatchNorm) -> nn.Module:
    """Convert the BatchNorm layers of a backbone, in place.

    - "group" makes each a GroupNorm with its affine parameters: as many groups of at least 16 channels as there can be,
      32 at most, and one where there are fewer channels.
    - "frozen" takes its running statistics for constants, in training too; the affine parameters are trained.
    - "local" does so with the statistics of each client's own examples, for a method that keeps these layers on the
      client, such as `FedBN`.

    Args:
        backbone: any module.
        choice: what they become.

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
            f"{named} does more than nn.BatchNorm2d does, or has no shape yet, so batch_norm: {choice} cannot stand "
            "for it: put another layer in its place."
        )
    if choice == "group":
        groups = group_count(layer.num_features)
        norm = nn.GroupNorm(groups, layer.num_features, layer.eps, affine=False)
        norm.affine = layer.affine
        norm.weight, norm.bias = layer.weight, layer.bias
        return norm
    if layer.running_mean is None:
        raise ConfigurationError(
            f"{named} has no running statistics (track_running_stats=False), which batch_norm: {choice} begins with: "
            "use batch_norm: group."
        )
    return FixedBatchNorm(layer) if choice == "frozen" else ClientBatchNorm(layer)


def group_count(channels: int) -> int:
    """Return into how many groups channels are divided.

    Args:
        channels: number of channels.
    """
    most = min(GROUPS, max(1, channels // CHANNELS))
    return max(groups for groups in range(1, most + 1) if channels % groups == 0)


def statistics_of(x: Tensor, mask: Tensor, empty: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of channels over the real instances, as BatchNorm normalizes a batch of them alone.

    Args:
        x: [N, C, ...].
        mask: [N] bool, which of the instances are real.
        empty: mean and variance [C] where none is.

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
