"""Draw Gaussian noise: from the seed and the round, for experiments, or from the system's secure generator."""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

from flow_pl.utils.rng import Stream, generator

AVERAGED = 4
"""Number of secure normals averaged into one (Holohan and Braghin, Secure Random Sampling in Differential Privacy,
ESORICS 2021): their sum hides the low bits of each, which could reveal it."""

AT_ONCE = 1 << 20
"""Number of secure normals drawn at once, to bound the memory."""

UPDATES, CLIPPED = 0, 1
"""Purposes of noise: for the sum of the updates, or for the number of clients within the norm."""


def seeded_noise(size: int, seed: int, round_: int, purpose: int) -> NDArray[np.float32]:
    """Draw standard normals [size], a function of the arguments alone."""
    return generator(seed, Stream.NOISE, round_, purpose).standard_normal(size, dtype=np.float32)


def secure_noise(size: int) -> NDArray[np.float32]:
    """Draw standard normals [size] from `os.urandom`, which cannot be repeated."""
    noise = np.empty(size, dtype=np.float32)
    for start in range(0, size, AT_ONCE):
        stop = min(start + AT_ONCE, size)
        noise[start:stop] = sum(_box_muller(stop - start) for _ in range(AVERAGED)) / math.sqrt(AVERAGED)
    return noise


def _box_muller(size: int) -> NDArray[np.float64]:
    """Draw standard normals [size] in double precision."""
    half = (size + 1) // 2
    bits = np.frombuffer(os.urandom(16 * half), dtype=np.uint64) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), so the logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
