"""Workloads of random examples, generated from a seed, the same for every contender.

Minibatches come in the order of the data, so that every contender does the same arithmetic and ends with the same
model. Clients are sorted, the largest first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flow_pl.models import EMNISTCNN, MLP, NextWordLSTM
from flow_pl.tasks import Classification, NextToken, Objective

Clients = list[tuple[Tensor, Tensor]]
"""Features [n, ...] and labels [n] of each client, the largest client first."""


@dataclass(frozen=True)
class Workload:
    """Describes a round of federated averaging with one local epoch.

    Attributes:
        name: name of the workload.
        clients: number of clients, which all take part in every round.
        shape: shape of an example's features; for a language model, the number of tokens in a sequence.
        classes: number of classes, or of tokens.
        backbone: creates the model.
        batch_size: number of examples in a minibatch of a client.
        lr: learning rate of the clients' SGD.
        momentum: momentum of the clients' SGD.
        chunk_sizes: candidates for the number of clients that our loop trains side by side; the fastest is used.
        rounds: number of timed rounds.
        examples: mean number of examples of a client.
        sigma: sigma of log-normal client sizes; 0 for equal sizes.
        flow: whether our round is that of Flow, which is compared only with our FedAvg round.
        tokens: whether examples are sequences of tokens, each predicted from those before it.
        peers: contenders in their own processes, see `tools.benchmarks.peers`.
        peer_rounds: number of timed rounds of the peers.
        peer_heats: number of rounds before these, to warm up.
    """

    name: str
    clients: int
    shape: tuple[int, ...]
    classes: int
    backbone: Callable[[], nn.Sequential]
    batch_size: int
    lr: float
    momentum: float
    chunk_sizes: tuple[int, ...]
    rounds: int
    examples: int = 100
    sigma: float = 0.0
    flow: bool = False
    tokens: bool = False
    peers: tuple[str, ...] = ()
    peer_rounds: int = 5
    peer_heats: int = 2

    def __str__(self) -> str:
        sizes = f"log-normal sizes (mean {self.examples}, sigma {self.sigma:g})" if self.sigma else f"{self.examples}"
        momentum = f", momentum {self.momentum:g}" if self.momentum else ""
        return f"{self.name}: {self.clients} clients x {sizes}, batch {self.batch_size}, lr {self.lr:g}{momentum}"

    def sizes(self) -> list[int]:
        """Return the number of examples of each client, in decreasing order."""
        mean = np.log(self.examples) - self.sigma**2 / 2
        drawn = np.exp(np.random.default_rng(0).normal(mean, self.sigma, self.clients))
        return sorted((max(1, round(size)) for size in drawn.tolist()), reverse=True)

    def data(self) -> Clients:
        """Generate the clients' examples."""
        random = np.random.default_rng(1)
        if self.tokens:
            # As frequent as words; 0 is padding, which does not occur.
            drawn = (random.zipf(1.3, size=(n, self.shape[0] + 1)) % (self.classes - 1) + 1 for n in self.sizes())
            sequences = [torch.from_numpy(tokens) for tokens in drawn]
            return [(s[:, :-1].contiguous(), s[:, 1:].contiguous()) for s in sequences]
        return [
            (
                torch.from_numpy(random.standard_normal((n, *self.shape), dtype=np.float32)),
                torch.from_numpy(random.integers(self.classes, size=n)),
            )
            for n in self.sizes()
        ]

    def model(self) -> nn.Sequential:
        """Create the initial model, the same in every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return self.backbone()

    @property
    def kind(self) -> str:
        """Return the kind of the model: mlp, cnn or lstm."""
        return "lstm" if self.tokens else "cnn" if len(self.shape) == 3 else "mlp"

    def loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Compute the mean cross-entropy, over tokens if examples are sequences."""
        return F.cross_entropy(outputs.flatten(0, -2), y.flatten())

    def objective(self) -> Objective:
        """Create the same loss for our loop."""
        return NextToken() if self.tokens else Classification()

    def optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Create a client's optimizer."""
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)


_mlp = partial(
    Workload,
    clients=30,
    shape=(60,),
    classes=10,
    backbone=partial(MLP, 60, 10, (64,)),
    batch_size=10,
    lr=0.01,
    momentum=0.0,
    chunk_sizes=(30,),
)
_lstm = partial(
    Workload,
    clients=5,
    examples=32,
    shape=(20,),
    classes=10_004,
    backbone=NextWordLSTM,
    batch_size=16,
    lr=0.01,
    momentum=0.0,
    chunk_sizes=(1, 5),
    tokens=True,
)
_cnn = partial(
    Workload,
    clients=10,
    shape=(1, 28, 28),
    classes=62,
    backbone=partial(EMNISTCNN, 62, dropout=(0.0, 0.0)),
    batch_size=20,
    lr=0.01,
    momentum=0.9,
    chunk_sizes=(1, 10),
)

_all_peers = ("bare", "pfl", "flwr", "fedjax", "blazefl", "fluke")

WORKLOADS = {
    workload.name: workload
    for workload in (
        _mlp("mlp", rounds=40, peers=_all_peers, peer_rounds=20, peer_heats=6),
        _cnn("cnn", rounds=5, peers=_all_peers),
        _lstm("lstm", rounds=5, peers=_all_peers),
        # The peers train client by client, like the bare loop; FedJAX pads a client's last minibatch.
        _mlp("skew", rounds=25, sigma=1.0, peers=("bare",), peer_rounds=20, peer_heats=6),
        _mlp("flow_mlp", rounds=40, flow=True),
        _cnn("flow_cnn", rounds=5, flow=True),
        _lstm("flow_lstm", rounds=3, flow=True),
    )
}
"""All workloads by name, in the order in which they run."""
