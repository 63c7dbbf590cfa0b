"""Choose which clients take part in a round, on which process, in which chunk."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from flow_pl.data.availability import Availability
from flow_pl.data.batch import Chunk
from flow_pl.data.federation import Ints
from flow_pl.errors import ConfigurationError
from flow_pl.utils.rng import Stream, generator
from flow_pl.utils.validation import given, require_choice, require_count

SamplingName = Literal["fixed", "poisson", "cyclic_poisson"]

SPREADS = 4
"""Standard deviations above its expected size up to which a Poisson cohort fits into chunks of the usual size."""


def check_cycle(sampling: str, cycle_length: int) -> None:
    """Check the settings of a sampling scheme.

    Raises:
        ConfigurationError: there is no such scheme, or it has no groups.
    """
    require_choice(get_args(SamplingName), sampling=sampling)
    require_count(cycle_length=cycle_length)
    if cycle_length > 1 and sampling != "cyclic_poisson":
        raise ConfigurationError(
            f"cycle_length is {cycle_length} and sampling {sampling}, which has no groups: set sampling to "
            "cyclic_poisson, or leave out cycle_length."
        )


class CohortSampler(DistributedSampler[Chunk]):
    """Draws the cohort of a round and cuts this process's share of it into chunks.

    Clients are shared over the processes by longest processing time: the largest first, each to the process with the
    fewest examples so far. Every process yields the same number of chunks in every round, as collective operations
    need; a process with fewer clients ends with empty chunks.

    It subclasses `DistributedSampler`, which it replaces: so Lightning sets the round by `set_epoch`, and never wraps
    it in another sampler, which would drop clients.

    Args:
        clients: [M] indices of the clients to draw from.
        sizes: [M] their numbers of training examples, the cost of a client.
        cohort_size: number of clients to draw without replacement for each round, or once for evaluation; None = all.
        chunk_size: number of clients trained or evaluated side by side.
        seed: seed of the run.
        rank: index of this process.
        world_size: number of processes.
        training: whether the chunks are for training; evaluation draws its clients once, independently of training.
        setting: name of the setting that `cohort_size` comes from, for messages.
        sampling: "fixed", a cohort of `cohort_size` without replacement, or "poisson": every client independently with
            probability cohort_size / M, so that cohorts vary in size and may be empty; or "cyclic_poisson": every
            client is in one of `cycle_length` groups, independently with equal probabilities, and in round t those of
            group t mod `cycle_length` are drawn independently with probability cohort_size * cycle_length / M.
        cycle_length: number of groups of "cyclic_poisson".
        availability: which clients of the cohort report back; the others are not trained. None = all.

    Attributes:
        absent: number of clients of the current cohort that do not report back, by reason; empty if all do.
        served: for each chunk of the current cohort, the number of clients in the chunks that all processes have at the
            same time.

    Raises:
        ConfigurationError: a size is not positive, or the cohort is larger than the population or than a group.
    """

    def __init__(
        self,
        clients: Ints,
        sizes: Ints,
        *,
        cohort_size: int | None,
        chunk_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        training: bool = True,
        setting: str = "cohort_size",
        sampling: SamplingName = "fixed",
        cycle_length: int = 1,
        availability: Availability | None = None,
    ) -> None:
        require_count(chunk_size=chunk_size, world_size=world_size, **given(**{setting: cohort_size}))
        require_count(0, seed=seed, rank=rank)
        check_cycle(sampling, cycle_length)
        if cohort_size is not None and cohort_size > len(clients):
            raise ConfigurationError(
                f"{setting} is {cohort_size}, but there are only {len(clients)} clients to draw from: "
                f"set {setting} to {len(clients)} or less."
            )
        super().__init__(cast("Dataset[Any]", clients), num_replicas=world_size, rank=rank, shuffle=False, seed=seed)
        self._cohort = len(clients) if cohort_size is None else cohort_size
        self._cycle_length = cycle_length
        self._poisson = sampling != "fixed"
        if self._cohort * cycle_length > len(clients):
            raise ConfigurationError(
                f"{setting} is {self._cohort} and cycle_length {cycle_length}, but there are only {len(clients)} "
                f"clients, {len(clients) / cycle_length:g} in a group on average: set {setting} to "
                f"{len(clients) // cycle_length} or less, or a smaller cycle_length."
            )
        self._draw_from(clients, sizes)
        self._chunk_size = chunk_size
        self._training = training
        self._availability = availability
        self.absent: dict[str, int] = {}
        self.served: list[int] = []

    def __len__(self) -> int:
        """Return the number of chunks of each process, the same in every round."""
        chunks = math.ceil(self._room / (self.num_replicas * self._chunk_size))
        # one more, since a process may get more clients than another if they are smaller
        return chunks + (self.num_replicas > 1 and self._room > self._chunk_size)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the chunks of this process in the current round, the largest clients first."""
        cohort = self._arrived(self._draw())
        size = max(self._chunk_size, math.ceil(len(cohort) / max(1, self.num_replicas * len(self))))
        starts = range(0, len(self) * size, size)
        shares = self._shares(cohort, size)
        self.served = [sum(len(share[start : start + size]) for share in shares) for start in starts]
        share = shares[self.rank]
        round_ = self.epoch if self._training else -1
        for start in starts:
            yield Chunk(round_, tuple(self._clients[share[start : start + size]].tolist()))

    def _draw_from(self, clients: Ints, sizes: Ints) -> None:
        """Set the clients to draw from, and their numbers of training examples."""
        self._clients, self._sizes = clients, sizes
        self._groups = self._divided(self._cycle_length)
        # Enough for nearly every cohort; a round with more clients has larger chunks.
        self._room = max(map(self._most, self._groups))

    @property
    def _population(self) -> int:
        """Return the number of clients whose expected cohort has the wanted size."""
        return max(1, len(self._clients))

    @property
    def _rate(self) -> float:
        """Return the probability of a client whose turn it is."""
        return min(1.0, self._cohort * len(self._groups) / self._population)

    def _divided(self, groups: int) -> list[Ints]:
        """Divide the positions of the population into groups, in ascending order."""
        if groups == 1:
            return [np.arange(len(self._clients))]
        # each client for itself, not into groups of equal size: whether a client is there moves no other one
        turn = generator(self.seed, Stream.CYCLE).integers(groups, size=len(self._clients))
        return [np.flatnonzero(turn == group) for group in range(groups)]

    def _most(self, group: Ints) -> int:
        """Return the size of nearly the largest cohort of a group."""
        expected = math.ceil(self._cohort * len(self._groups) * len(group) / self._population)
        spread = math.sqrt(expected * (1 - self._rate)) if self._poisson else 0.0
        return min(len(group), expected + math.ceil(SPREADS * spread))

    def _draw(self) -> Ints:
        """Draw the positions of the cohort, the largest clients first, ties in the order of the population."""
        if len(self._groups) == 1 and self._rate >= 1:
            cohort = np.arange(len(self._clients))
        else:
            # evaluation: the same clients after every round, or the best round would be that of the easiest clients
            keys = (Stream.COHORT, self.epoch) if self._training else (Stream.EVALUATION_COHORT, 0)
            random = generator(self.seed, *keys)
            group = self._groups[self.epoch % len(self._groups)]
            # independent draws: first the number of clients, then which ones
            size = random.binomial(len(group), self._rate) if self._poisson else self._cohort
            # unshuffled, so that numpy draws a small cohort without a pass over the population
            cohort = np.sort(random.choice(len(group), size, replace=False, shuffle=False))
            if len(self._groups) > 1:
                cohort = group[cohort]
        return cohort[np.argsort(-self._sizes[cohort], kind="stable")]

    def _arrived(self, cohort: Ints) -> Ints:
        """Return the clients of the cohort that report back."""
        if self._availability is None:
            return cohort
        clients, sizes = self._clients[cohort], self._sizes[cohort]
        arrivals = self._availability.arrivals(self.seed, self.epoch, clients, sizes)
        self.absent = {"dropped": arrivals.dropped, "late": arrivals.late}
        return cohort[arrivals.in_time]

    def _shares(self, cohort: Ints, chunk_size: int) -> list[Ints]:
        """Assign the cohort to the processes."""
        if self.num_replicas == 1:
            return [cohort]
        room = len(self) * chunk_size
        loads = [(0, rank) for rank in range(self.num_replicas)]
        shares: list[list[int]] = [[] for _ in loads]
        for position in cohort.tolist():
            load, rank = heapq.heappop(loads)
            shares[rank].append(position)
            if len(shares[rank]) < room:
                heapq.heappush(loads, (load + int(self._sizes[position]), rank))
        return [np.array(share, dtype=np.int64) for share in shares]
