"""Create random streams that depend on what is drawn, never on the process or the order of draws.

Every draw names its stream and its keys (a client, a round). So results do not depend on the number of processes or
loader workers, the chunk size, or earlier draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

_Words = NDArray[np.uint32]


class Stream(IntEnum):
    """Purpose of a stream of random numbers. A used number keeps its meaning forever, since results depend on it."""

    SPLIT = 1
    """Split of a client's rows into train, validation and test; keys: client."""
    POPULATION = 2
    """Choice of the new clients; no key."""
    COHORT = 3
    """The clients trained in a round; keys: round."""
    EVALUATION_COHORT = 4
    """The clients evaluated after every round; key: 0."""
    ORDER = 5
    """The order of a client's examples in training; keys: round, client."""
    EVALUATION_ORDER = 6
    """The order of a client's examples when a model is personalized for evaluation; keys: client."""
    PART = 7
    """Split of a client's training examples into a local and a global share; keys: client."""
    SYNTHETIC = 8
    """A client of a generated data set; keys: client."""
    CONCEPT = 9
    """The common part of a generated data set; no key."""
    PARTITION = 10
    """Partition of a pool of examples into clients; no key."""
    STYLE = 11
    """The style of a client's generated data; keys: client."""
    DROPOUT = 12
    """A client's draws during training (dropout); keys: round + 1, client."""
    AVAILABILITY = 13
    """Whether a sampled client reports back, and how fast it is; keys: round, client."""
    DIAGNOSIS = 14
    """Choice of the clients on which the gradient is measured; keys: round."""
    CYCLE = 15
    """The group of every client, of which each is sampled in its turn; no key."""
    NOISE = 40
    """The noise of a private round; keys: number of earlier private rounds, purpose of the noise."""
    ATTACKERS = 41
    """Choice of the attacking clients; no key."""


def key(seed: int, stream: Stream, *keys: int) -> int:
    """Return a key for a generator on the device (`counter_rng`), as a function of the arguments only.

    Args:
        seed: the seed of the run, 0 or more.
        stream: purpose of the numbers.
        *keys: subjects of the draw, each 0 or more.

    Returns:
        A signed 64-bit integer.
    """
    return int(_sequence(seed, stream, keys).generate_state(1, np.uint64).view(np.int64)[0])


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """Return a generator that depends only on the arguments.

    Args:
        seed: the seed of the run or of the split, 0 or more.
        stream: purpose of the numbers.
        *keys: subjects of the draw, each 0 or more; a stream always has the same number of keys.

    Returns:
        A generator that is independent of those of all other streams and keys.
    """
    # default_rng would create the same generator in twice the time
    return np.random.Generator(np.random.PCG64(_sequence(seed, stream, keys)))


def client_keys(seed: int, stream: Stream, *keys: int, clients: Sequence[int]) -> NDArray[np.int64]:
    """Return `key(seed, stream, *keys, client)` for several clients at once.

    Args:
        seed: the seed of the run, 0 or more.
        stream: purpose of the numbers.
        *keys: subjects of the draw except the client, each 0 or more.
        clients: [C] the clients, each 0 or more.

    Returns:
        [C] signed 64-bit integers.
    """
    if any(client >> 32 for client in clients):
        return np.array([key(seed, stream, *keys, client) for client in clients], dtype=np.int64)
    return _states(_pools(seed, stream, keys, clients), 2).view(np.int64)[:, 0]


def client_generators(seed: int, stream: Stream, *keys: int, clients: Sequence[int]) -> list[np.random.Generator]:
    """Return `generator(seed, stream, *keys, client)` for several clients at once.

    Args:
        seed: the seed of the run, 0 or more.
        stream: purpose of the numbers.
        *keys: subjects of the draw except the client, each 0 or more.
        clients: [C] the clients, each 0 or more.
    """
    if any(client >> 32 for client in clients):
        return [generator(seed, stream, *keys, client) for client in clients]
    states = _states(_pools(seed, stream, keys, clients), 8).view(np.uint64)
    # numpy accepts any object with this method, unlike its annotation
    return [np.random.Generator(np.random.PCG64(_State(state))) for state in states]  # type: ignore[arg-type]


class _State(ISeedSequence):
    """A seed sequence whose state for PCG64 is known."""

    def __init__(self, state: NDArray[np.uint64]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Return the state, 4 words of 64 bits."""
        return self._state


# The algorithm of `numpy.random.SeedSequence`, which numpy guarantees to keep (after O'Neill's seed_seq_fe128): a pool
# of 4 words of 32 bits. Here the last word of the entropy is mixed in for many clients at once.
_POOL, _SHIFT = 4, np.uint32(16)
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def _pools(seed: int, stream: Stream, keys: tuple[int, ...], clients: Sequence[int]) -> _Words:
    """Return the pools [C, 4] of the seed sequences of (seed, stream, keys, client)."""
    before = _sequence(seed, stream, keys)
    words = max(_POOL, _words(seed)) + sum(map(_words, before.spawn_key))
    # each word has been hashed once for each word of the pool
    hashed = _hashed(np.array(clients, dtype=np.uint32)[:, None], _constants(_INIT_A, _MULT_A, _POOL, _POOL * words))
    mixed: _Words = _MIX_L * before.pool - _MIX_R * hashed
    mixed ^= mixed >> _SHIFT
    return mixed


def _states(pools: _Words, words: int) -> _Words:
    """Return the states [C, words] that seed sequences with these pools generate."""
    return np.ascontiguousarray(_hashed(pools[:, np.arange(words) % _POOL], _constants(_INIT_B, _MULT_B, words)))


def _hashed(values: _Words, constants: _Words) -> _Words:
    """Return hashes [C, n] of values [C, n] or [C, 1], each column with its own constants of [n + 1]."""
    hashed: _Words = (values ^ constants[:-1]) * constants[1:]
    hashed ^= hashed >> _SHIFT
    return hashed


@cache
def _constants(first: int, factor: int, count: int, skipped: int = 0) -> _Words:
    """Return the constants [count + 1] first * factor ** i, in 32 bits."""
    return np.array([first * pow(factor, skipped + i, 2**32) % 2**32 for i in range(count + 1)], dtype=np.uint32)


def _words(number: int) -> int:
    """Return the number of 32-bit words of an integer."""
    return max(1, -(-number.bit_length() // 32))


def _sequence(seed: int, stream: Stream, keys: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *map(int, keys)))
