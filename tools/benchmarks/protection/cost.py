"""Measure the processor time of rounds on one thread: the server's part by aggregation, and what privacy adds."""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median

import torch

from flow_pl.data.batch import ClientBatch, Examples
from flow_pl.engine import aggregation
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.privacy import GaussianMechanism, Sampling
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.engine.training_statistics import TrainingStatistics
from flow_pl.methods import FedAvg
from flow_pl.methods.base import Method
from flow_pl.models import EMNISTCNN
from flow_pl.tasks import Classification
from tools.benchmarks.protection.runs import AGGREGATIONS

ALTERNATIONS = 5
"""How often rounds with and without privacy are measured, one after the other."""


def network() -> Method:
    """Return FedAvg on the EMNIST network, with 1.2 million parameters."""
    return FedAvg().bind(EMNISTCNN(num_classes=62, in_shape=(1, 28, 28)), Classification())


def print_server_cost() -> None:
    """Print the time of the server's part of a round of 100 clients, for every aggregation."""
    method = network()
    print(f"parameters: {sum(p.numel() for p in server_groups(method)['global'].values())}")
    parts = [chunk(method, 10, client) for client in range(0, 100, 10)]
    classes = {name: getattr(aggregation, name) for name in AGGREGATIONS}
    for name, make in {**classes, "private mean": None}.items():
        privacy = None if make else planned()
        times = []
        for _ in range(3):
            start = time.process_time()
            round_ = ServerRound(method, aggregation=make() if make else None, privacy=privacy)
            for update in parts:
                round_.add(replace(update, difference={"global": dict(update.difference["global"])}))
            round_.finish(lambda tensor: tensor, 0)
            times.append(time.process_time() - start)
        print(f"{name} | {min(times):.2f} s")


def print_overhead() -> None:
    """Print the time of rounds of 10 clients with 100 images each, private and not, and of the server's part."""
    method, privacy = network(), planned()
    server, loop, batch = server_groups(method), FederatedLoop(1, batch_size=20), images(10, 100)
    spent: dict[str, list[tuple[float, float]]] = {"plain": [], "private": []}
    for name in ("plain", "private") * (ALTERNATIONS + 1):
        start = time.process_time()
        update = loop.train_clients(method, server, batch)
        trained = time.process_time()
        round_ = ServerRound(method, privacy=privacy if name == "private" else None)
        round_.add(update)
        round_.finish(lambda tensor: tensor, 0)
        spent[name].append((time.process_time() - start, time.process_time() - trained))
    for name, times in spent.items():
        # the first one of each warms up
        rounds, parts = zip(*times[1:], strict=True)
        shown = ", ".join(f"{each:.2f}" for each in rounds)
        print(f"{name} | median {median(rounds):.2f} s, of the server's part {median(parts):.3f} s | {shown}")


def planned() -> GaussianMechanism:
    """Create the mechanism of a fit of 1,000 rounds."""
    privacy = GaussianMechanism(1e-5, noise_multiplier=1.0)
    privacy.plan(Sampling("poisson", 3400, 100), 1000, 0)
    return privacy


def chunk(method: Method, clients: int, first: int) -> ClientUpdate:
    """Create random updates."""
    difference = {"global": {k: torch.randn(clients, *p.shape) for k, p in server_groups(method)["global"].items()}}
    statistics = TrainingStatistics(torch.device("cpu"))
    return ClientUpdate(
        torch.arange(first, first + clients), difference, {"global": torch.ones(clients)}, statistics, {}
    )


def images(clients: int, rows: int) -> ClientBatch:
    """Create a chunk of random images."""
    mask = torch.ones(clients, rows, dtype=torch.bool)
    y = torch.randint(62, (clients, rows))
    train = Examples(torch.rand(clients, rows, 1, 28, 28), y, mask, (rows,) * clients)
    order = torch.stack([torch.randperm(rows) for _ in range(clients)])[:, None]
    numbers, part = torch.arange(clients), torch.ones(clients, rows, dtype=torch.uint8)
    return ClientBatch(numbers, train, part, order, None, 0, numbers)
