"""The batch passed from the data to the federated loop: a chunk of clients, padded to rectangles.

The first axis of every tensor is the CLIENT axis (C), the second the example axis (N), padded to the longest
client of the chunk. Sizes are also kept on the host, so that the loop plans its steps without asking the device.
The dataclasses are not frozen: Lightning could not convert them to another precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.utils.inputs import Inputs, take

LOCAL, GLOBAL = 1, 2
"""Bits of `ClientBatch.part`: the example belongs to the local / global share of its client's training data."""
FOLDS, FOLD_BIT = 4, 2
"""Number of folds of a client's training data; the bits of `ClientBatch.part` from FOLD_BIT on number the fold."""


class Chunk(NamedTuple):
    """Names a few clients that are trained or evaluated side by side; yielded by the sampler.

    Attributes:
        round: the communication round, from which the minibatch order is drawn; -1 in evaluation.
        clients: indices into the client store; empty if a process has nothing left to do.
    """

    round: int
    clients: tuple[int, ...]


@dataclass
class Examples:
    """Holds the padded examples of a chunk of clients.

    Attributes:
        x: features [C, N, ...]; where they are several by name, a mapping of tensors, in whose padding each client's
            first example is repeated.
        y: targets [C, N] or [C, N, ...]; -1 where an example has no label, 0 in the padding.
        mask: [C, N] bool, True where the example is real.
        sizes: number of real examples of each client, on the host; they come first in each row.
    """

    x: Inputs
    y: Tensor
    mask: Tensor
    sizes: tuple[int, ...]

    def clients(self, start: int, stop: int) -> Examples:
        """Select some of the clients, as views padded to their longest."""
        sizes = self.sizes[start:stop]
        longest = max(sizes, default=0)
        some = slice(start, stop), slice(longest)
        return Examples(take(self.x, some), self.y[some], self.mask[some], sizes)


@dataclass
class ClientBatch:
    """Holds a chunk of clients, in order of decreasing number of training examples.

    Attributes:
        client: [C] int64, indices into the client store.
        train: the clients' training examples.
        part: [C, N] uint8, bits LOCAL and GLOBAL: which share of the training data an example is in (both, where a
            client has a single example), and from FOLD_BIT on its fold; 0 in the padding.
        order: [C, E, N] int64, for each local epoch the order in which a client's examples are visited, drawn from
            (seed, round, client); row e is a permutation of 0..N-1 whose first `train.sizes[c]` entries are the
            client's real examples.
        heldout: the examples to evaluate on, in evaluation only.
        round: the communication round; -1 in evaluation.
        key: [C] int64, key of each client's random draws in training (dropout), drawn from (seed, round, client).
        unusable: clients left out of the chunk because their data cannot be used, each with the reason.
    """

    client: Tensor
    train: Examples
    part: Tensor
    order: Tensor
    heldout: Examples | None
    round: int
    key: Tensor
    unusable: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        """Return the number of clients."""
        return len(self.train.sizes)

    def clients(self, start: int, stop: int) -> ClientBatch:
        """Select some of the clients, padded to their longest.

        Args:
            start: position of the first one.
            stop: position after the last one.
        """
        train = self.train.clients(start, stop)
        longest = train.mask.shape[1]
        return replace(
            self,
            client=self.client[start:stop],
            train=train,
            part=self.part[start:stop, :longest],
            # a client's own examples come first in its order
            order=self.order[start:stop, :, :longest],
            heldout=None if self.heldout is None else self.heldout.clients(start, stop),
            key=self.key[start:stop],
        )

    def to(self, *args: Any, **kwargs: Any) -> ClientBatch:
        """Move every tensor, as `torch.Tensor.to` does."""
        return _map(self, lambda t: t.to(*args, **kwargs))

    def pin_memory(self) -> ClientBatch:
        """Pin every tensor, for asynchronous copies to a device."""
        return _map(self, lambda t: t.pin_memory())


def part_sizes(n: int) -> tuple[int, int]:
    """Return the sizes of the local and the global part of n training examples: halves; one example is in both."""
    return (n + 1) // 2, max(1, n // 2) if n else 0


def part_bits(rank: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the bits of `ClientBatch.part` [n] for n examples in a random order, given each one's rank in it [n]."""
    local_size, global_size = part_sizes(len(rank))
    halves = LOCAL * (rank < local_size) | GLOBAL * (rank >= len(rank) - global_size)
    bits: NDArray[np.uint8] = (halves | (rank % FOLDS) << FOLD_BIT).astype(np.uint8)
    return bits


def fold_size(n: int, fold: int) -> int:
    """Return how many of n training examples are in a fold; the first folds have one more if n is no multiple."""
    return max(0, n - fold + FOLDS - 1) // FOLDS


T = TypeVar("T", Examples, ClientBatch)


def _map(value: T, fn: Callable[[Tensor], Tensor]) -> T:
    changed: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            changed[field.name] = fn(item)
        elif isinstance(item, dict):
            changed[field.name] = {name: fn(each) for name, each in item.items()}
        elif isinstance(item, Examples):
            changed[field.name] = _map(item, fn)
    return replace(value, **changed)


__all__ = [
    "FOLDS",
    "FOLD_BIT",
    "GLOBAL",
    "LOCAL",
    "Chunk",
    "ClientBatch",
    "Examples",
    "fold_size",
    "part_bits",
    "part_sizes",
]
