"""Turn a chunk of clients into the padded tensors of a `ClientBatch`; runs in the loader's workers."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from flow_pl.data.batch import Chunk, ClientBatch, Examples, part_bits
from flow_pl.data.federation import Federation, Heldout, Ints, Split
from flow_pl.errors import DataError
from flow_pl.utils.inputs import map_inputs
from flow_pl.utils.rng import Stream, client_generators, client_keys, generator
from flow_pl.utils.validation import given, require_choice, require_count

Part = NDArray[np.uint8]

PLANS_KEPT = 4096
"""Number of clients whose split and parts are kept in memory: some megabytes, whatever the population."""


class ClientDataset(Dataset[ClientBatch]):
    """Reads the clients of a federation, indexed by `Chunk`.

    A client's draws depend only on the seed, the round and the client, so a client looks the same in any
    chunk, process or worker.

    Args:
        federation: the clients and their splits.
        seed: seed of the run, for the order of the examples and the local and global parts.
        heldout: the rows to evaluate on; None in training.
        orders: number of orders to draw of each client's examples, one for each epoch.
    """

    def __init__(self, federation: Federation, seed: int, heldout: Heldout | None = None, orders: int = 1) -> None:
        require_count(orders=orders)
        require_count(0, seed=seed)
        require_choice(get_args(Heldout), **given(heldout=heldout))
        self.federation = federation
        self.seed = seed
        self.heldout = heldout
        self.orders = orders
        self._plans: dict[int, tuple[Split, Part]] = {}

    def __getitem__(self, chunk: Chunk) -> ClientBatch:
        """Read the clients of a chunk.

        Args:
            chunk: the clients, possibly none, and the round (-1 in evaluation).

        Returns:
            The clients in order of decreasing number of training examples, ties in the order of the chunk,
            without those whose data cannot be used. Features have the type they are stored in.
        """
        clients, plans, unusable = self._usable(chunk)
        splits = [split for split, _ in plans]
        train = self._examples(clients, [split.train for split in splits])
        longest = max(train.sizes, default=0)
        part = np.zeros((len(clients), longest), dtype=np.uint8)
        order = np.broadcast_to(np.arange(longest), (len(clients), self.orders, longest)).copy()
        generators = self._order_generators(chunk.round, clients)
        for i, (random, size, (_, bits)) in enumerate(zip(generators, train.sizes, plans, strict=True)):
            part[i, :size] = bits
            for epoch in range(self.orders):
                order[i, epoch, :size] = random.permutation(size)
        heldout = None
        if self.heldout is not None:
            heldout = self._examples(clients, [split.heldout(self.heldout) for split in splits])
        return ClientBatch(
            client=torch.tensor(clients, dtype=torch.int64),
            train=train,
            part=torch.from_numpy(part),
            order=torch.from_numpy(order),
            heldout=heldout,
            round=chunk.round,
            key=torch.from_numpy(self._keys(chunk.round, clients)),
            unusable=tuple(unusable),
        )

    def _usable(self, chunk: Chunk) -> tuple[list[int], list[tuple[Split, Part]], list[tuple[int, str]]]:
        """Return the usable clients, the largest first, their splits and parts, and the excluded ones with reasons.

        Raises:
            DataError: a client to be evaluated cannot be used; an accuracy without it would be wrong.
        """
        clients, plans, unusable = [], [], []
        for client in sorted(chunk.clients, key=lambda client: -int(self.federation.train_sizes[client])):
            try:
                plans.append(self._plan(client))
                clients.append(client)
            except DataError as error:
                if self.heldout is not None:
                    raise
                unusable.append((client, str(error)))
        return clients, plans, unusable

    def _examples(self, clients: list[int], chosen: list[Ints]) -> Examples:
        """Read the chosen rows of each client; chosen: their numbers among the client's rows."""
        store = self.federation.store
        sizes = tuple(len(index) for index in chosen)
        longest = max(sizes, default=0)
        rows = np.zeros((len(clients), longest), dtype=np.int64)
        for row, index in zip(rows, chosen, strict=True):
            row[: len(index)] = index
            # padding repeats a real instance: a model may turn zeros, including the mask of tokens, into NaN
            row[len(index) :] = index[0] if len(index) else 0
        x, labels = store.rows(rows + store.offsets[clients][:, None])
        y = labels.astype(np.float32 if store.real_valued else np.int64, copy=False)
        for i, size in enumerate(sizes):
            if size < longest:
                y[i, size:] = 0
                if not isinstance(x, dict):
                    x[i, size:] = 0
        mask = np.arange(longest) < np.array(sizes, dtype=np.int64)[:, None]
        return Examples(map_inputs(torch.from_numpy, x), torch.from_numpy(y), torch.from_numpy(mask), sizes)

    def _plan(self, client: int) -> tuple[Split, Part]:
        """Return a client's split and parts, the same in every round and cached since drawing them is slower.

        Raises:
            DataError: its data cannot be used.
        """
        if client not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.clear()
            self.federation.store.check(client)
            split = self.federation.split(client)
            self._plans[client] = (split, draw_part(self.seed, self.number(client), len(split.train)))
        return self._plans[client]

    def number(self, client: int) -> int:
        """Return the number that seeds a client's draws: its index, if the store holds all clients of the run."""
        return client

    def _keys(self, round_: int, clients: list[int]) -> Ints:
        # streams have no negative keys, but the round is -1 in evaluation
        return client_keys(self.seed, Stream.DROPOUT, round_ + 1, clients=[self.number(client) for client in clients])

    def _order_generators(self, round_: int, clients: list[int]) -> list[np.random.Generator]:
        numbers = [self.number(client) for client in clients]
        if round_ < 0:  # in evaluation a client is personalized identically after every round
            return client_generators(self.seed, Stream.EVALUATION_ORDER, clients=numbers)
        return client_generators(self.seed, Stream.ORDER, round_, clients=numbers)


def draw_part(seed: int, client: int, size: int) -> Part:
    """Draw the parts and folds [size] of a client's training examples, once for a run; see `ClientBatch.part`."""
    return part_bits(generator(seed, Stream.PART, client).permutation(size))
