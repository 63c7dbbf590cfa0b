"""The data module of the server: cohorts of clients whose examples stay on their nodes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flow_pl.data import FederatedDataModule
from flow_pl.data.batch import Chunk, ClientBatch, Examples
from flow_pl.data.federation import Federation, Heldout, Ints, Population
from flow_pl.data.loaders import Loader
from flow_pl.data.sampler import CohortSampler
from flow_pl.deploy.nodes import Feature, FewNodesWarning, NodeClient, Nodes, NodesError
from flow_pl.errors import ConfigurationError
from flow_pl.utils.inputs import Inputs, from_leaves

EVERYONE = 2**31
"""Size of a chunk that holds any cohort, since all nodes of a round are asked at once."""


class RemoteFederation:
    """The clients of the nodes, with the interface of a `Federation`, but without rows.

    Args:
        clients: descriptions of the clients, by number.
    """

    def __init__(self, clients: dict[int, NodeClient]) -> None:
        self.clients = clients
        some = next(iter(clients.values()))
        size = max(clients) + 1
        classes = max(known.classes for known in clients.values())
        self.train_sizes, self.val_sizes, self.test_sizes = (np.zeros(size, dtype=np.int32) for _ in range(3))
        for client, known in clients.items():
            self.train_sizes[client], self.val_sizes[client], self.test_sizes[client] = (
                known.train,
                known.val,
                known.test,
            )
        self.seen: Ints = np.array(sorted(clients), dtype=np.int64)
        self.new: Ints = np.zeros(0, dtype=np.int64)
        self.validation: Ints = np.zeros(0, dtype=np.int64)
        self.store = SimpleNamespace(
            # the labels are on the nodes
            meta=SimpleNamespace(num_classes=classes, class_names=(), largest_label=None),
            label_shape=some.label_shape,
            real_valued=some.real_valued,
            name=self.name,
        )

    def name(self, client: int) -> str:
        """Return the name of a client."""
        return self.clients[client].name

    def heldout_sizes(self, rows: Heldout) -> Ints:
        """Return the number of rows that each client is evaluated on, by client number."""
        return self.val_sizes if rows == "val" else self.test_sizes

    def population(self, client: int) -> Population:
        """Return "seen", since all clients of the nodes are trained."""
        return "seen"


class NodesData(FederatedDataModule):
    """Data module of the nodes' clients; the batches have no examples, which stay on the nodes.

    Args:
        source: data module of the configuration, used only for its settings.
        nodes: the nodes.
        start: seconds to wait at the start for as many nodes as the cohort has clients.
        registered: number of clients that may take part, for cohorts that are secret: every connected client is drawn
            with probability cohort_size / registered, from a seed of the system's generator, as nodes know that of the
            run. None for cohorts of the connected clients, drawn from the run's seed.

    Raises:
        ConfigurationError: fewer clients are registered than a cohort has.
    """

    def __init__(self, source: FederatedDataModule, nodes: Nodes, start: float, registered: int | None = None) -> None:
        super().__init__(
            cohort_size=source.cohort_size,
            chunk_size=EVERYONE,
            val_clients=source.val_clients,
            seed=source.seed,
            sampling=source.sampling,
            cycle_length=source.cycle_length,
        )
        if registered is not None and registered < self.cohort_size:
            raise ConfigurationError(
                f"registered-clients is {registered}, expected the number of clients that may take part in this "
                f"private run, at least data.cohort_size ({self.cohort_size}): set it by "
                "`flwr run APP --run-config 'registered-clients=1000'`."
            )
        self.nodes = nodes
        self.registered = registered
        self._source = source
        self._start = start

    @property
    def population_size(self) -> int:
        """Return the number of clients that cohorts are drawn from: those registered, or else those known."""
        return super().population_size if self.registered is None else self.registered

    def options(self) -> dict[str, Any]:
        """Return no options, since nothing is stored."""
        return {}

    def clients(self) -> Iterator[Any]:
        """Return no clients, since they are on their nodes."""
        return iter(())

    def transform(self, x: Tensor) -> Tensor:
        """Return the input; there are no examples."""
        return x

    def prepare_data(self) -> None:
        """Do nothing."""

    def setup(self, stage: str | None = None) -> None:
        """Wait for the nodes.

        Args:
            stage: fit, validate, test or predict; all are set up alike.

        Raises:
            NodesError: there are too few nodes.
        """
        if self._federation is None:
            found = self.nodes.online(self.cohort_size, self._start)
            if len(found) < self.cohort_size:
                warnings.warn(
                    f"a cohort has {self.cohort_size} clients (data.cohort_size), and {len(found)} can take part: "
                    "rounds continue with these until more nodes are connected.",
                    FewNodesWarning,
                    stacklevel=2,
                )
            self.refresh()

    def refresh(self) -> None:
        """Update the federation to the known clients."""
        if not self.nodes.clients:
            raise NodesError("no node has a client that can take part: see the warning for each.")
        self._federation = cast(Federation, RemoteFederation(dict(self.nodes.clients)))

    def example(self) -> Inputs:
        """Return a synthetic example [1, ...] in the shape of the nodes' examples."""
        features = next(iter(self.nodes.clients.values())).features
        names = tuple(feature.name for feature in features if feature.name is not None)
        return from_leaves(names or None, map(_made_up, features))

    def _loader(
        self, clients: Ints, heldout: Heldout | None, cohort_size: int | None = None, setting: str = "cohort_size"
    ) -> Loader:
        sampler = NodeSampler(self, clients, heldout, cohort_size)
        return DataLoader(NodeBatches(), sampler=sampler, batch_size=None, generator=torch.Generator())


def _made_up(feature: Feature) -> Tensor:
    """Create a synthetic input; one of several integer inputs may be a mask, so it is not all zeros."""
    if feature.tokens:
        return torch.full((1, *feature.shape), int(feature.name is not None), dtype=torch.int64)
    return torch.rand(1, *feature.shape, generator=torch.Generator().manual_seed(0))


class NodeSampler(CohortSampler):
    """Draws a cohort from the clients whose nodes are connected at the start of the round.

    Args:
        data: data module of the nodes.
        clients: numbers of the known clients.
        heldout: rows to evaluate on; None in training.
        cohort_size: number of clients to draw; None for all.
    """

    def __init__(self, data: NodesData, clients: Ints, heldout: Heldout | None, cohort_size: int | None) -> None:
        wanted = len(clients) if cohort_size is None else cohort_size
        self._registered = data.registered if heldout is None else None
        # nodes receive the run's seed, so a secret cohort cannot follow from it
        secret = None if self._registered is None else int.from_bytes(os.urandom(8), "big")
        super().__init__(
            clients,
            data.federation.train_sizes[clients],
            cohort_size=min(wanted, len(clients)),
            chunk_size=EVERYONE,
            seed=data.run_seed if secret is None else secret,
            training=heldout is None,
            sampling=data.sampling if heldout is None else "fixed",
            cycle_length=data.cycle_length if heldout is None else 1,
        )
        self._data = data
        self._heldout = heldout
        self._wanted = cohort_size

    def __iter__(self) -> Iterator[Chunk]:
        """Yield the cohort."""
        known = len(self._data.nodes.clients) if self._wanted is None else self._wanted
        clients = np.array(self._data.nodes.online(known), dtype=np.int64)
        self._data.refresh()
        federation = self._data.federation
        if self._heldout is not None:
            clients = clients[federation.heldout_sizes(self._heldout)[clients] > 0]
        if self._wanted is None:
            self._cohort = len(clients)
        else:
            self._cohort = self._wanted if self._registered else min(self._wanted, len(clients))
        self._draw_from(clients, federation.train_sizes[clients])
        return super().__iter__()

    @property
    def _population(self) -> int:
        """Return the number of registered clients, or else of connected ones."""
        return super()._population if self._registered is None else self._registered


class NodeBatches(Dataset[ClientBatch]):
    """Chunks of clients without examples, which are on the nodes."""

    def __getitem__(self, chunk: Chunk) -> ClientBatch:
        """Return the clients of a chunk by number."""
        c = len(chunk.clients)
        none = torch.zeros(c, 0)
        nothing = Examples(none, none.long(), none.bool(), (0,) * c)
        clients = torch.tensor(chunk.clients, dtype=torch.int64)
        order = torch.zeros(c, 1, 0, dtype=torch.int64)
        return ClientBatch(clients, nothing, none.byte(), order, None, chunk.round, torch.zeros_like(clients))
