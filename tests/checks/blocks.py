"""Blocks that cannot be served, and backbones around them."""

import torch
from torch import nn

FEATURES, CLASSES = 6, 3


class Block(nn.Module):
    """A function of (block, x), with parts of its own."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def first(layer):
    """The outputs alone of a layer that gives a tuple."""
    return Block(lambda block, x: block.layer(x)[0], layer=layer)


def between(*blocks):
    """Vectors, two linear blocks around others."""
    return nn.Sequential(nn.Linear(FEATURES, 8), *blocks, nn.Linear(8, CLASSES))


def on_images(*blocks):
    """Images [3, 8, 8], a convolution, others and a linear block."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.Linear(144, CLASSES))


def on_sequences(*blocks):
    """Sequences [5, 6] or tokens [5], blocks and a linear one."""
    return nn.Sequential(*blocks, nn.Flatten(), nn.LazyLinear(CLASSES))


def shift_in_place(block, x):
    x -= 0.5
    return x


def running_mean(block, x):
    if block.training:
        block.mean = 0.9 * block.mean + 0.1 * x.detach().mean(0)
    return x - block.mean


def running_mean_in_place(block, x):
    block.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
    return x - block.mean


def remembers(block, x):
    block.last = x.detach().mean() + block.last / 2
    return x + block.last


def clamps_its_weights(block, x):
    block.layer.weight.data.clamp_(-0.1, 0.1)
    return block.layer(x)
