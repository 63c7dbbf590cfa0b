"""Generate random numbers as a function of (key, step, unit), by integer operations on tensors.

A counter-based generator (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011) has no state: number i
of a stream is a hash of the stream's key and of i. So a client draws the same numbers whether it is trained alone,
beside others or in a trace, without synchronizing with the device.

Every number takes two hashes. The hash of the unit is the same for all clients and is kept in a table. The other one
mixes it with the client's key of the step, and is all that is computed per client.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 32

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""The golden ratio in 64 bits, as int64: the distance between the counters of SplitMix64."""

_STEPS = 2**32
"""Counters reserved for the steps of a phase, in the counter from which a key is derived."""


def splitmix64(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele et al., OOPSLA 2014), a bijection of 64 bits.

    Args:
        x: int64 tensor of any shape.

    Returns:
        int64, in the shape of `x`.
    """
    x = shift_right(x, 30, 64).bitwise_xor_(x).mul_(0xBF58476D1CE4E5B9 - 2**64)
    x = shift_right(x, 27, 64).bitwise_xor_(x).mul_(0x94D049BB133111EB - 2**64)
    return shift_right(x, 31, 64).bitwise_xor_(x)


def shift_right(x: Tensor, by: int, bits: int) -> Tensor:
    """Shift integers of `bits` bits to the right logically, where torch's operator keeps the sign."""
    shifted: Tensor = (x >> by) & (2 ** (bits - by) - 1)
    return shifted


def step_keys(client_keys: Tensor, phase: int, steps: int) -> Tensor:
    """Return the keys of all steps of a phase: SplitMix64 (Steele et al., OOPSLA 2014) of a phase-and-step counter.

    Args:
        client_keys: [C] int64, drawn for each client and round.
        phase: index of the phase in the round.
        steps: largest number of steps of a client in the phase (S).

    Returns:
        [S, C, 2] int32: a value to mix into a unit's hash, and an odd factor.
    """
    device = client_keys.device
    counters = torch.arange(1, steps + 1, device=device, dtype=torch.int64) + phase * _STEPS
    keys = splitmix64(client_keys + (counters * GOLDEN).unsqueeze(1)).view(torch.int32).view(steps, len(client_keys), 2)
    keys[..., 1] |= 1
    return keys


def unit_hashes(start: int, count: int, device: torch.device) -> Tensor:
    """Hash units by a bijection of 32 bits in which each input bit flips half of the output bits on average.

    This is the finalizer of MurmurHash3, applied to multiples of the golden ratio.

    Args:
        start: number of the first unit.
        count: number of units.
        device: device of the result.

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
    """Return uniform random bits of one client.

    The high bits have the best quality, as in every generator that ends with a multiplication.

    Args:
        hashes: [...] int32 hashes of the units, from `unit_hashes`.
        key: [2] int32 key of a step, from `step_keys`.

    Returns:
        int32, in the shape of `hashes`.
    """
    # in place, since one tensor fits into the processor's cache
    x = hashes ^ key[0]
    x.mul_(0xCC9E2D51 - 2**32)
    # add instead of exclusive or: the shift keeps the sign, which would clear the highest bit
    x.add_(x >> 15)
    return x.mul_(key[1])


def below(bits: Tensor, share: float) -> Tensor:
    """Return True with probability `share`, exact to 2^-32."""
    return bits < _limit(share)


def ones_below(bits: Tensor, share: float) -> Tensor:
    """Return 1 with probability `share`, otherwise 0, in the type of the bits: `below` without truth values.

    On a CPU, integers are compared and converted to floats several elements at a time, truth values are not.
    """
    limit = _limit(share)
    # where `below` is true, the next smaller number, unless there is none
    return bits.clamp(max(limit - 1, -(2 ** (BITS - 1))), limit).sub_(limit).neg_()


def _limit(share: float) -> int:
    """Return the signed number of 32 bits that a share of all is below."""
    limit: int = min(round(share * 2**BITS) - 2 ** (BITS - 1), 2 ** (BITS - 1) - 1)
    return limit


def uniform(bits: Tensor) -> Tensor:
    """Return uniform float32 numbers in the open interval (0, 1), one of 2^23 values."""
    return ((bits >> 9).float() + (2**22 + 0.5)) * 2.0**-23
