"""Run BlazeFL's federated averaging: clients one after another, or in its pool of threads."""

from __future__ import annotations

import sys

import torch
from blazefl.contrib.fedavg import (
    FedAvgBaseClientTrainer,
    FedAvgBaseServerHandler,
    FedAvgThreadPoolClientTrainer,
    FedAvgUplinkPackage,
)
from blazefl.core import deserialize_model, serialize_model
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from tools.benchmarks.peers import nets
from tools.benchmarks.peers.gate import Gate
from tools.benchmarks.peers.handover import Handover, load


class Data:
    """The clients' examples; in BlazeFL's favour, a loader indexes a minibatch at once."""

    def __init__(self, handover: Handover) -> None:
        self.clients = [TensorDataset(*client) for client in nets.tensors(handover)]

    def get_dataloader(self, type_, cid, batch_size, generator):
        data = self.clients[cid]
        batches = BatchSampler(SequentialSampler(data), batch_size, drop_last=False)
        return DataLoader(data, sampler=batches, batch_size=None)


class Models:
    """Creates models, by whatever name."""

    def __init__(self, handover: Handover) -> None:
        self.handover = handover

    def select_model(self, model_name):
        return nets.make(self.handover)


def train(model, parameters, loader, cid, handover: Handover) -> FedAvgUplinkPackage:
    """Train a client as BlazeFL's own trainers do, with momentum and a loss for sequences."""
    deserialize_model(model, parameters)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=handover.lr, momentum=handover.momentum)
    for x, y in loader:
        optimizer.zero_grad()
        nets.loss(model(x), y).backward()
        optimizer.step()
    return FedAvgUplinkPackage(cid, serialize_model(model), len(loader.dataset))


class Serial(FedAvgBaseClientTrainer):
    """Trains one client after another."""

    handover: Handover

    def train(self, model_parameters, train_loader, cid):
        return train(self.model, model_parameters, train_loader, cid, self.handover)


class Pool(FedAvgThreadPoolClientTrainer):
    """Trains several clients at a time, each in a thread."""

    handover: Handover

    def train(self, model, model_parameters, train_loader, device, epochs, lr, stop_event, cid):
        return train(model, model_parameters, train_loader, cid, self.handover)


def main() -> None:
    handover, parallel = load(), int(sys.argv[2])
    clients, models, data = len(handover.clients), Models(handover), Data(handover)
    server = FedAvgBaseServerHandler(models, "net", data, 10**6, clients, 1.0, "cpu", handover.batch_size, 0)
    common = (models, "net", data, "cpu", clients, 1, handover.batch_size, handover.lr, 0)
    trainer = Serial(*common) if parallel == 1 else Pool(*common, parallel)
    trainer.handover = handover
    gate = Gate()
    while settings := gate.next(lambda: nets.flat(server.model)):
        torch.set_num_threads(settings["threads"])
        trainer.local_process(server.downlink_package(), server.sample_clients())
        for package in trainer.uplink_package():
            server.load(package)


if __name__ == "__main__":
    main()
