"""Our rounds: by the federated loop alone, and by Lightning's Trainer with all costs of a user's run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from flow_pl import FederatedLoop, FederatedModule
from flow_pl.checks import check_fit
from flow_pl.data import GLOBAL, LOCAL, ClientBatch, ClientData, Examples, FederatedDataModule, part_sizes
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.methods import FedAvg, Flow, Method
from flow_pl.models.routers import InstanceRouter, SequenceRouter
from tools.benchmarks.workloads import Clients, Workload

TRACE_AFTER = 1
"""Number of steps of a kind before its gradient is traced; tracing is finished after the warm-up rounds."""


METHODS: dict[str, Callable[[bool], Method]] = {
    "FedAvg": lambda tokens: FedAvg(),
    "Flow": lambda tokens: Flow(split="parts", router=SequenceRouter if tokens else InstanceRouter),
}
"""Measured methods with one local epoch, for instances or for sequences of tokens."""


def federated_module(workload: Workload, flow: bool = False) -> FederatedModule:
    """Create a LightningModule from the workload's model, method and loop."""
    chosen = METHODS["Flow" if flow else "FedAvg"](workload.tokens)
    images = len(workload.shape) == 3
    loop = FederatedLoop(
        1, None, workload.batch_size, workload.optimizer, trace_after=TRACE_AFTER, channels_last=images
    )
    module = FederatedModule(workload.model(), chosen, loop, workload.objective())
    example = torch.zeros(1, *workload.shape, dtype=torch.int64 if workload.tokens else torch.float32)
    check_fit(module.method, example, workload.classes)
    return module


def chunk(clients: Clients, orders: int = 1) -> ClientBatch:
    """Create a batch of clients, the largest first, padded and in the order of the data."""
    sizes = tuple(len(y) for _, y in clients)
    count, longest = len(sizes), max(sizes)
    x, y = (t.new_zeros(count, longest, *t.shape[1:]) for t in clients[0])
    part = torch.zeros(count, longest, dtype=torch.uint8)
    for i, (features, labels) in enumerate(clients):
        n = len(labels)
        x[i, :n], y[i, :n] = features, labels
        part[i, : part_sizes(n)[0]] |= LOCAL
        part[i, n - part_sizes(n)[1] : n] |= GLOBAL
    mask = torch.arange(longest) < torch.tensor(sizes)[:, None]
    train = Examples(x, y, mask, sizes)
    clients = torch.arange(count)
    return ClientBatch(clients, train, part, _data_order(count, orders, longest), None, round=0, key=clients)


def _data_order(clients: int, epochs: int, longest: int) -> Tensor:
    return torch.arange(longest).expand(clients, epochs, longest).contiguous()


class LoopRounds:
    """Runs rounds by the federated loop and the server's optimizer, on chunks in memory.

    Args:
        workload: the workload.
        clients: data of the workload.
        chunk_size: number of clients trained side by side.
        flow: whether the round is that of Flow rather than FedAvg.
        reduce: sums a tensor over processes if each has a share of the clients.
    """

    def __init__(
        self,
        workload: Workload,
        clients: Clients,
        chunk_size: int,
        flow: bool = False,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        self.module = federated_module(workload, flow)
        self.reduce = reduce
        self.chunks = [
            chunk(clients[i : i + chunk_size], self.module.orders) for i in range(0, len(clients), chunk_size)
        ]
        self.optimizer = torch.optim.SGD(self.module.server.parameters(), lr=1.0)

    def __call__(self) -> None:
        """Make a round."""
        method, loop = self.module.method, self.module.loop
        round_ = ServerRound(method)
        for batch in self.chunks:
            round_.add(loop.train_clients(method, server_groups(method), batch))
        round_.finish(self.reduce, 0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flat(self) -> Tensor:
        """Return the server's model as one vector."""
        return flat(self.module)


def flat(module: FederatedModule) -> Tensor:
    """Return a copy of the server's model as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in module.backbone.parameters()])


class WorkloadData(FederatedDataModule):
    """Provides a workload's clients from a store, which the training process reads in every round.

    Args:
        workload: the workload.
        clients: data of the workload.
        chunk_size: number of clients trained side by side.
        folder: folder of the store.
    """

    def __init__(self, workload: Workload, clients: Clients, chunk_size: int, folder: str) -> None:
        super().__init__(
            cohort_size=len(clients),
            chunk_size=chunk_size,
            new_client_fraction=0.0,
            val_fraction=0.0,
            test_fraction=0.0,
            seed=0,
            cache_dir=folder,
        )
        self._workload = workload
        self._clients = clients

    def options(self) -> dict[str, Any]:
        """Return the workload's name, which suffices in a separate folder."""
        return {"workload": self._workload.name}

    def class_count(self) -> int:
        """Return the workload's number of classes."""
        return self._workload.classes

    def clients(self) -> Iterator[ClientData]:
        """Yield the workload's clients."""
        for i, (x, y) in enumerate(self._clients):
            yield ClientData(f"{i:03d}", x.numpy(), y.numpy())

    def on_after_batch_transfer(self, batch: ClientBatch, dataloader_idx: int) -> ClientBatch:
        """Replace the drawn order by that of the data, as the other contenders use it."""
        order = _data_order(*batch.order.shape)
        return replace(super().on_after_batch_transfer(batch, dataloader_idx), order=order)


def fit(
    workload: Workload,
    clients: Clients,
    chunk_size: int,
    rounds: int,
    folder: str,
    callbacks: Sequence[Callback],
    processes: int = 1,
) -> None:
    """Train by Lightning's Trainer as a user does, without loggers, checkpoints and validation."""
    data = WorkloadData(workload, clients, chunk_size, folder)
    trainer(rounds, callbacks, processes).fit(federated_module(workload), datamodule=data)


def trainer(rounds: int, callbacks: Sequence[Callback], processes: int = 1) -> lightning.Trainer:
    """Create Lightning's Trainer on the CPU; with several processes, the caller must start each."""
    return lightning.Trainer(
        max_epochs=rounds,
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )
