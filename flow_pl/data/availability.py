"""Simulate which sampled clients report back in time: devices go offline, or are too slow for their data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import given, require_at_least_zero, require_count, require_fraction


class Arrivals(NamedTuple):
    """Tells which clients of a cohort report back.

    Attributes:
        in_time: [C] bool, which clients report back.
        dropped: number of clients that went offline.
        late: number of the others that had not finished by the deadline.
    """

    in_time: NDArray[np.bool_]
    dropped: int
    late: int


class Availability:
    """Simulates dropouts and stragglers.

    As in a deployment, a server samples more clients than report back, and does not wait (Bonawitz et al., Towards
    Federated Learning at Scale, MLSys 2019, section 2). Each client's outcome is drawn from (seed, round, client).

    Args:
        dropout: probability that a sampled client goes offline before it reports.
        deadline: number of training examples that a client of median speed processes before the round is
            closed; clients that need longer are left out. None = the server waits for all.
        speed_spread: standard deviation of the logarithm of a client's speed in a round; 0 = all are equally fast.

    Raises:
        ConfigurationError: a setting is out of range.
    """

    def __init__(self, dropout: float = 0.0, deadline: int | None = None, speed_spread: float = 0.0) -> None:
        require_fraction(dropout=dropout)
        require_at_least_zero(speed_spread=speed_spread)
        require_count(**given(deadline=deadline))
        self._dropout = dropout
        self._deadline = np.inf if deadline is None else deadline
        self._spread = speed_spread

    @property
    def all_arrive(self) -> bool:
        """Return whether there is nothing to simulate."""
        return self._dropout == 0 and np.isinf(self._deadline)

    def arrivals(self, seed: int, round_: int, clients: NDArray[np.int64], sizes: NDArray[np.int64]) -> Arrivals:
        """Simulate which clients of a cohort report back.

        Args:
            seed: seed of the run.
            round_: number of the round.
            clients: [C] indices into the client store.
            sizes: [C] numbers of training examples of the clients.
        """
        offline = np.zeros(len(clients), dtype=bool)
        speed = np.ones(len(clients))
        for i, client in enumerate(clients.tolist()):
            random = generator(seed, Stream.AVAILABILITY, round_, client)
            offline[i] = random.random() < self._dropout
            speed[i] = np.exp(self._spread * random.standard_normal())
        late = ~offline & (sizes > self._deadline * speed)
        return Arrivals(~offline & ~late, int(offline.sum()), int(late.sum()))
