"""Draw random numbers for many clients at once, each a function of (seed, round, client, position) alone.

A counter-based generator: the position is hashed with a key of the client by the finalizer of SplitMix64 (Steele et
al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). So no number depends on the chunk, the process or the
type of device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flow_pl.utils.counter_rng import GOLDEN, shift_right, splitmix64


def client_keys(client: Tensor, seed: int, round_: int, purpose: int) -> Tensor:
    """Compute a key for each client.

    Args:
        client: [C] int64 indices of the clients.
        seed: seed of the run.
        round_: round of the numbers; any integer.
        purpose: purpose of the numbers, so that different uses differ.

    Returns:
        [C] int64 keys.
    """
    key = torch.zeros_like(client)
    for number in (seed % 2**63, round_, purpose):
        key = splitmix64(key + GOLDEN + number)
    return splitmix64(key + GOLDEN + client)


def uniform(keys: Tensor, size: int, first: int = 0) -> Tensor:
    """Draw uniform numbers in [0, 1).

    Args:
        keys: [C] keys of the clients.
        size: number of values for each client.
        first: position of the first value.

    Returns:
        [C, size] float32, multiples of 2^-24.
    """
    positions = torch.arange(first + 1, first + size + 1, device=keys.device) * GOLDEN
    bits = splitmix64(keys[:, None] + positions)
    return shift_right(bits, 40, 64).to(torch.float32) * 2.0**-24


def normal(keys: Tensor, size: int) -> Tensor:
    """Draw standard normals [C, size] by the Box-Muller transform."""
    half = (size + 1) // 2
    radius = (-2 * (1 - uniform(keys, half)).log()).sqrt()  # 1 - u is never 0
    angle = 2 * math.pi * uniform(keys, half, half)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]
