"""Random numbers of many clients at once, on the device, each a function of (seed, round, client, position) alone.

A counter-based generator: the position is hashed with a key of the client by the finalizer of SplitMix64 (Steele et
al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). So no number depends on the chunk, the process or the
kind of device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, as int64
FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND = -7723592293110705685  # 0x94D049BB133111EB


def client_keys(client: Tensor, seed: int, round_: int, purpose: int) -> Tensor:
    """A key for each client.

    Args:
        client: [C] int64, indices.
        seed: of the run.
        round_: of the numbers; any whole number.
        purpose: what they are for.

    Returns:
        [C] int64.
    """
    key = torch.zeros_like(client)
    for number in (seed % 2**63, round_, purpose):
        key = _mix(key + GOLDEN + number)
    return _mix(key + GOLDEN + client)


def uniform(keys: Tensor, size: int, first: int = 0) -> Tensor:
    """Numbers in [0, 1).

    Args:
        keys: [C] of the clients.
        size: numbers of each.
        first: position of the first one.

    Returns:
        [C, size] float32, multiples of 2^-24.
    """
    positions = torch.arange(first + 1, first + size + 1, device=keys.device) * GOLDEN
    bits = _mix(keys[:, None] + positions)
    return _shifted(bits, 40).to(torch.float32) * 2.0**-24


def normal(keys: Tensor, size: int) -> Tensor:
    """Standard normals [C, size], by Box and Muller's transform."""
    half = (size + 1) // 2
    radius = (-2 * (1 - uniform(keys, half)).log()).sqrt()  # 1 - u is never 0
    angle = 2 * math.pi * uniform(keys, half, half)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """The logical shift to the right, where torch's keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
