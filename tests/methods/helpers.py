"""What the tests of methods with personal models share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from flow_pl.checks import check_fit
from flow_pl.data.batch import ClientBatch
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.server_round import server_groups
from flow_pl.evaluation.clients import evaluate_clients
from flow_pl.evaluation.counts import ClientEvaluation
from flow_pl.methods.base import Method
from flow_pl.tasks import MultiLabel
from flow_pl.utils.groups import Groups, Parameters
from tests.models import test_sequences
from tests.support import FEATURES, chunk, loop, network

TAGS = 5
TASKS = ("next token", "multi-label")


def filled(parameters: Parameters) -> nn.Sequential:
    """`tests.support.network` with these parameters."""
    backbone = network()
    backbone.load_state_dict(parameters)
    return backbone


def client_of(group: Parameters, client: int) -> Parameters:
    """One client's parameters of a stacked group."""
    return {name: p[client].clone() for name, p in group.items()}


def copied(groups: Groups) -> Groups:
    """A copy, for the loop changes in place what clients kept."""
    return {name: {key: p.clone() for key, p in group.items()} for name, group in groups.items()}


def next_server(server: Groups) -> Groups:
    """Another model on the server, as other clients might have left it."""
    generator = torch.Generator().manual_seed(7)

    def moved(p: Tensor) -> Tensor:
        return p + 0.2 * torch.randn(p.shape, generator=generator)

    return {name: {key: moved(p) for key, p in group.items()} for name, group in server.items()}


def on_task(method: Method, task: str, epochs: int = 2) -> tuple[ClientUpdate, ClientEvaluation]:
    """Two tiny clients of a task: a round, and an evaluation on the very examples that they train on."""
    if task == "next token":
        batch = test_sequences.batch((6, 5), epochs)
        method = test_sequences.bound(method)
    else:
        batch = with_tags(chunk((11, 6), epochs))
        torch.manual_seed(0)
        method = method.bind(nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, TAGS)), MultiLabel(k=2))
        check_fit(method, torch.zeros(1, FEATURES), TAGS)
    server = server_groups(method)
    batch = replace(batch, heldout=batch.train)
    trains = loop(local_epochs=epochs)
    return trains.train_clients(method, server, batch), evaluate_clients(trains, method, server, batch)


def with_tags(batch: ClientBatch) -> ClientBatch:
    """The chunk with several labels for each example, some with none."""
    generator = torch.Generator().manual_seed(3)
    tags = torch.rand(*batch.train.mask.shape, TAGS, generator=generator) < 0.3
    return replace(batch, train=replace(batch.train, y=tags.long()))
