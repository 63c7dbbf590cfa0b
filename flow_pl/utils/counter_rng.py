"""Random numbers that are a function of (key, step, unit) alone, by integer operations on tensors.

A counter-based generator (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) has no state: number i
of a stream is a hash of the stream's key and of i. So a client draws the same whether it is trained alone, beside
others or in a trace, and the device is asked for nothing.

Every number takes two hashes. That of the unit is the same for all clients and is kept in a table. The other one mixes
it with the client's key of the step, and is all that is computed for each client.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 32

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The golden ratio in 64 bits, as int64: the distance between the counters of SplitMix64."""

_STEPS = 2**32
"""Room for the steps of a phase in the counter that a key is made of."""


def splitmix64(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): a bijection of 64 bits.

    Args:
        x: int64, of any shape.

    Returns:
        int64, in the shape of `x`.
    """
    x = shift_right(x, 30, 64).bitwise_xor_(x).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x = shift_right(x, 27, 64).bitwise_xor_(x).mul_(0x94D049BB133111EB - 2**64)
    return shift_right(x, 31, 64).bitwise_xor_(x)


def shift_right(x: Tensor, by: int, bits: int) -> Tensor:
    """The logical shift to the right of whole numbers of so many bits, where torch's keeps the sign."""
    shifted: Tensor = (x >> by) & (2 ** (bits - by) - 1)
    return shifted


def step_keys(client_keys: Tensor, phase: int, steps: int) -> Tensor:
    """The keys of all steps of a phase: SplitMix64 (Steele et al., OOPSLA 2014) at a counter of phase and step.

    Args:
        client_keys: [C] int64, drawn for each client and round.
        phase: its number in the round.
        steps: how many steps a client makes in the phase at most (S).

    Returns:
        [S, C, 2] int32: what is mixed into a unit's hash, and an odd factor.
    """
    device = client_keys.device
    counters = torch.arange(1, steps + 1, device=device, dtype=torch.int64) + phase * _STEPS
    keys = splitmix64(client_keys + (counters * GOLDEN).unsqueeze(1)).view(torch.int32).view(steps, len(client_keys), 2)
    keys[..., 1] |= 1
    return keys


def unit_hashes(start: int, count: int, device: torch.device) -> Tensor:
    """Hashes of units: a bijection of 32 bits that changes half of them with each bit of the unit's number.

    By the finalizer of MurmurHash3 on multiples of the golden ratio.

    Args:
        start: number of the first unit.
        count: how many.
        device: where.

    Returns:
        [count] int32.
    """
    x = torch.arange(start, start + count, dtype=torch.int32, device=device)
    x = x * (0x9E3779B9 - 2**32)
    x = x ^ shift_right(x, 16, BITS)
    x = x * (0x85EBCA6B - 2**32)
    x = x ^ shift_right(x, 13, BITS)
    x = x * (0xC2B2AE35 - 2**32)
    return x ^ shift_right(x, 16, BITS)


def random_bits(hashes: Tensor, key: Tensor) -> Tensor:
    """Uniform bits of one client.

    The high bits are the best ones, as in every generator that ends with a product.

    Args:
        hashes: of the units [...], int32, from `unit_hashes`.
        key: [2] int32, of a step, from `step_keys`.

    Returns:
        int32, in the shape of `hashes`.
    """
    x = hashes ^ key[0]
    x = x * (0xCC9E2D51 - 2**32)
    # by a sum where others take an exclusive or: a shift keeps the sign, which would clear the highest bit there
    x = x + (x >> 15)
    return x * key[1]


def below(bits: Tensor, share: float) -> Tensor:
    """True with a probability of `share`, which is exact to 2^-32."""
    kept: Tensor = bits < min(round(share * 2**BITS) - 2 ** (BITS - 1), 2 ** (BITS - 1) - 1)
    return kept


def uniform(bits: Tensor) -> Tensor:
    """Float32 numbers in (0, 1), neither end among them, of 2^23 values."""
    return ((bits >> 9).float() + (2**22 + 0.5)) * 2.0**-23
