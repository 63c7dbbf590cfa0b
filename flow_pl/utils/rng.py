"""Random streams that depend on what is drawn, never on who draws it or when.

Every draw names its stream and its keys (a client, a round). So a result is the same whatever the number of
processes or loader workers, the chunk size, or the draws made before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray

_Words = NDArray[np.uint32]


class Stream(IntEnum):
    """What a stream of random numbers is for. A number, once used, keeps its meaning: results depend on it."""

    SPLIT = 1
    """A client's rows into train, validation and test; keys: client."""
    POPULATION = 2
    """Which clients are new; no key."""
    COHORT = 3
    """The clients trained in a round; keys: round."""
    EVALUATION_COHORT = 4
    """The clients evaluated after every round; key: 0."""
    ORDER = 5
    """The order of a client's examples in training; keys: round, client."""
    EVALUATION_ORDER = 6
    """The order of a client's examples when a model is personalized for evaluation; keys: client."""
    PART = 7
    """A client's training examples into a local and a global share; keys: client."""
    SYNTHETIC = 8
    """A client of a generated data set; keys: client."""
    CONCEPT = 9
    """What the clients of a generated data set share; no key."""
    PARTITION = 10
    """A pool of examples into clients; no key."""
    STYLE = 11
    """How a client writes; keys: client."""
    DROPOUT = 12
    """What a client draws while it is trained (dropout); keys: round + 1, client."""
    AVAILABILITY = 13
    """Whether a sampled client reports back, and how fast it is; keys: round, client."""
    DIAGNOSIS = 14
    """The clients on which the gradient is measured; keys: round."""
    NOISE = 40
    """The noise of a private round; keys: private rounds before it, what the noise is for."""
    ATTACKERS = 41
    """Which clients attack; no key."""


def key(seed: int, stream: Stream, *keys: int) -> int:
    """A key for a generator that runs on a device (`counter_rng`), a function of the arguments alone.

    Args:
        seed: the seed of the run, 0 or more.
        stream: what the numbers are for.
        *keys: what they are drawn for, each 0 or more.

    Returns:
        A whole number of 64 bits, with a sign.
    """
    return int(_sequence(seed, stream, keys).generate_state(1, np.uint64).view(np.int64)[0])


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
    """A generator that is a function of its arguments alone.

    Args:
        seed: the seed of the run or of the split, 0 or more.
        stream: what the numbers are for.
        *keys: what they are drawn for, each 0 or more; a stream always has the same number of keys.

    Returns:
        A generator independent of that of any other stream or key.
    """
    # default_rng would make the same generator in twice the time
    return np.random.Generator(np.random.PCG64(_sequence(seed, stream, keys)))


def client_keys(seed: int, stream: Stream, *keys: int, clients: Sequence[int]) -> NDArray[np.int64]:
    """`key(seed, stream, *keys, client)` for several clients at once.

    Args:
        seed: the seed of the run, 0 or more.
        stream: what the numbers are for.
        *keys: what they are drawn for, each 0 or more, but for the client.
        clients: [C] the clients, each 0 or more.

    Returns:
        [C] whole numbers of 64 bits, with a sign.
    """
    if any(client >> 32 for client in clients):
        return np.array([key(seed, stream, *keys, client) for client in clients], dtype=np.int64)
    return _states(_pools(seed, stream, keys, clients), 2).view(np.int64)[:, 0]


def client_generators(seed: int, stream: Stream, *keys: int, clients: Sequence[int]) -> list[np.random.Generator]:
    """`generator(seed, stream, *keys, client)` for several clients at once.

    Args:
        seed: the seed of the run, 0 or more.
        stream: what the numbers are for.
        *keys: what they are drawn for, each 0 or more, but for the client.
        clients: [C] the clients, each 0 or more.
    """
    if any(client >> 32 for client in clients):
        return [generator(seed, stream, *keys, client) for client in clients]
    states = _states(_pools(seed, stream, keys, clients), 8).view(np.uint64)
    # numpy takes whatever has a state; its annotation does not know
    return [np.random.Generator(np.random.PCG64(_State(state))) for state in states]  # type: ignore[arg-type]


class _State(ISeedSequence):
    """A seed sequence whose state for PCG64 is known."""

    def __init__(self, state: NDArray[np.uint64]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """The state, of 4 words of 64 bits."""
        return self._state


# What `numpy.random.SeedSequence` does, which numpy keeps as it is (after O'Neill's seed_seq_fe128): a pool of 4 words
# of 32 bits, into which the last word of the entropy is mixed here for many clients at once.
_POOL, _SHIFT = 4, np.uint32(16)
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def _pools(seed: int, stream: Stream, keys: tuple[int, ...], clients: Sequence[int]) -> _Words:
    """[C, 4] the pools of the seed sequences of (seed, stream, keys, client)."""
    before = _sequence(seed, stream, keys)
    words = max(_POOL, _words(seed)) + sum(map(_words, before.spawn_key))
    # each word has been hashed once for each word of the pool
    hashed = _hashed(np.array(clients, dtype=np.uint32)[:, None], _constants(_INIT_A, _MULT_A, _POOL, _POOL * words))
    mixed: _Words = _MIX_L * before.pool - _MIX_R * hashed
    mixed ^= mixed >> _SHIFT
    return mixed


def _states(pools: _Words, words: int) -> _Words:
    """[C, words] the states that seed sequences with these pools generate."""
    return np.ascontiguousarray(_hashed(pools[:, np.arange(words) % _POOL], _constants(_INIT_B, _MULT_B, words)))


def _hashed(values: _Words, constants: _Words) -> _Words:
    """[C, n] hashes of values [C, n], or [C, 1], each with constants of its own [n + 1]."""
    hashed: _Words = (values ^ constants[:-1]) * constants[1:]
    hashed ^= hashed >> _SHIFT
    return hashed


def _constants(first: int, factor: int, count: int, skipped: int = 0) -> _Words:
    """[count + 1] of the constants first * factor ** i, in 32 bits."""
    return np.array([first * pow(factor, skipped + i, 2**32) % 2**32 for i in range(count + 1)], dtype=np.uint32)


def _words(number: int) -> int:
    """How many words of 32 bits a whole number has."""
    return max(1, -(-number.bit_length() // 32))


def _sequence(seed: int, stream: Stream, keys: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *map(int, keys)))
