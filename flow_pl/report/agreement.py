"""Measure whether clients route alike: all personalized models are evaluated on the same instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.data.store.features import Features
from flow_pl.report.routes import ClientRoutes, Floats
from flow_pl.utils.inputs import Inputs, map_inputs, take, zip_inputs


class CommonInstances(NamedTuple):
    """Instances on which all clients are evaluated.

    Attributes:
        x: [K, ...] features, as passed to a model.
        y: [K, ...] targets.
    """

    x: Inputs
    y: Tensor


class Agreement(NamedTuple):
    """Agreement between the routes of n clients through B blocks on common instances.

    Attributes:
        same: [B] share of decisions on which two clients take the same branch, averaged over all pairs of clients.
        chance: [B] the expected value of `same` if each client routed locally as often as it does, but on random
                    instances.
        difference: [B] absolute difference of the probabilities, averaged over all pairs and decisions.
        pairs: [n, n] share of equal decisions of each pair, over all blocks.
        order: [n] indices into the given clients, the least local first, as in `pairs`.
    """

    same: Floats
    chance: Floats
    difference: Floats
    pairs: Floats
    order: list[int]

    @property
    def beyond_chance(self) -> Floats:
        """Return the agreement beyond chance [B] as a share of the possible (Cohen's kappa); NaN if there is none."""
        room = 1 - self.chance
        return np.where(room > 1e-9, (self.same - self.chance) / np.where(room > 1e-9, room, 1.0), np.nan)


def common_instances(data: FederatedDataModule, count: int) -> CommonInstances | None:
    """Choose test instances of clients spread over the seen population: one per client, more if clients are few.

    Args:
        data: the data module, set up.
        count: number of instances (K), if there are as many.

    Returns:
        The instances; None if no seen client has test instances.
    """
    federation = data.federation
    clients = [int(client) for client in federation.seen if federation.test_sizes[client] > 0]
    if not clients or not count:
        return None
    places = np.linspace(0, len(clients) - 1, min(count, len(clients))).round().astype(int)
    each = -(-count // len(places))
    x: list[Features] = []
    y = []
    for client in (clients[place] for place in places):
        rows, chosen = federation.store.read(client), federation.split(client).test[:each]
        x.append(take(rows.x, chosen))
        y.append(rows.y[chosen].astype(np.int64))

    def stacked(*parts: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)[:count])

    return CommonInstances(map_inputs(data.transform, zip_inputs(stacked, *x)), stacked(*y))


def with_common(batch: ClientBatch, common: CommonInstances | None) -> ClientBatch:
    """Return a chunk whose clients are evaluated on the common instances first, and then on their own.

    Args:
        batch: a chunk of clients in an evaluation.
        common: K instances; None for none.
    """
    own = batch.heldout
    assert own is not None
    if common is None:
        return batch

    def joined(first: Tensor, second: Tensor) -> Tensor:
        first = first.to(second.device, second.dtype)
        return torch.cat([first.expand(len(second), *first.shape), second], dim=1)

    real = torch.ones(len(common.y), dtype=torch.bool)
    sizes = tuple(len(common.y) + size for size in own.sizes)
    x = zip_inputs(joined, common.x, own.x)
    return replace(batch, heldout=Examples(x, joined(common.y, own.y), joined(real, own.mask), sizes))


def agreement(clients: Sequence[ClientRoutes]) -> Agreement | None:
    """Compare the clients' routes on the common instances; None for fewer than two clients or no instances.

    Args:
        clients: routes of clients on the same common instances.
    """
    if len(clients) < 2 or not len(clients[0].common):
        return None
    q = np.stack([client.common for client in clients])  # [n, D, B]
    order = np.argsort(q.mean((1, 2)), kind="stable")
    q = q[order]
    branches = (q > 0.5).astype(np.float64)
    clients_, decisions, blocks = q.shape
    pairs = np.stack([w @ w.T + (1 - w) @ (1 - w).T for w in np.moveaxis(branches, 2, 0)]) / decisions
    others = ~np.eye(clients_, dtype=bool)
    share = branches.mean(1)  # [n, B]
    expected = [np.outer(p, p) + np.outer(1 - p, 1 - p) for p in share.T]
    # mean absolute difference over all pairs, from the sorted values (as in the Gini coefficient)
    rank = 2 * np.arange(clients_) - clients_ + 1
    distance = (rank[:, None, None] * np.sort(q, axis=0)).sum(0) / (clients_ * (clients_ - 1) / 2)
    return Agreement(
        same=np.array([pairs[block][others].mean() for block in range(blocks)]),
        chance=np.array([expected[block][others].mean() for block in range(blocks)]),
        difference=distance.mean(0),
        pairs=pairs.mean(0),
        order=order.tolist(),
    )
