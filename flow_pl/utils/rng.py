"""Random streams that depend on what is drawn, never on who draws it or when.

Every draw names its stream and its keys (a client, a round). So a result is the same whatever the number of
processes or loader workers, the chunk size, or the draws made before it.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


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


def _sequence(seed: int, stream: Stream, keys: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *map(int, keys)))
