"""Run fluke's federated averaging, which trains one client after another."""

from __future__ import annotations

import os

import torch
from fluke.algorithms import CentralizedFL
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.server import Server
from fluke.utils import FederationObserver

from tools.benchmarks.peers import nets
from tools.benchmarks.peers.gate import Gate
from tools.benchmarks.peers.handover import load


class Loss(torch.nn.Module):
    """The loss as a module."""

    def forward(self, outputs, y):
        return nets.loss(outputs, y)


class Turns(FederationObserver):
    """Waits at the start of each round."""

    def __init__(self) -> None:
        self.gate = Gate()

    def start_round(self, round, global_model):  # noqa: A002  # fluke's own name
        settings = self.gate.next(lambda: nets.flat(global_model))
        if settings is None:
            os._exit(0)
        torch.set_num_threads(settings["threads"])


def main() -> None:
    handover = load()
    optimizer = OptimizerConfigurator({"name": "SGD", "lr": handover.lr, "momentum": handover.momentum})
    loaders = [
        FastDataLoader(x, y, num_labels=1, batch_size=handover.batch_size, skip_singleton=False)
        for x, y in nets.tensors(handover)
    ]
    # without persistency, as elsewhere: a client's momentum ends with its round
    clients = [
        Client(i, loader, None, optimizer, Loss(), local_epochs=1, persistency=False)
        for i, loader in enumerate(loaders)
    ]
    server = Server(nets.make(handover), None, clients, weighted=True)
    algorithm = CentralizedFL(len(clients), None, {}, clients, server)
    algorithm.set_callbacks(Turns())
    algorithm.run(10**6, 1.0)


if __name__ == "__main__":
    main()
