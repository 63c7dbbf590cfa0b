"""The client that Flower's actors run, in a module that they can import.

In Flower's favour, an actor keeps data and model between messages, and a client's minibatches are slices.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tools.benchmarks.peers import nets
from tools.benchmarks.peers.handover import load

client_app = ClientApp()


@lru_cache
def prepared(path: str, threads: int):
    """Return what an actor keeps between messages."""
    torch.set_num_threads(threads)
    handover = load(path)
    return handover, nets.make(handover), nets.tensors(handover)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train one client."""
    config = message.content["config"]
    handover, model, clients = prepared(config["path"], config["threads"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=handover.lr, momentum=handover.momentum)
    x, y = clients[context.node_config["partition-id"]]
    for xs, ys in zip(x.split(handover.batch_size), y.split(handover.batch_size), strict=True):
        optimizer.zero_grad()
        nets.loss(model(xs), ys).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(x)})}
    return Message(content=RecordDict(content), reply_to=message)
