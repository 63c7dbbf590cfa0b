"""Contenders without a framework: one round of federated averaging in plain PyTorch.

Every contender is called once a round and continues from its last model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from tools.benchmarks.workloads import Clients, Workload


class BareRounds:
    """Holds a server's model, as plain tensors, and the clients' shares in its mean.

    Attributes:
        server: the model's parameters after the last round.
    """

    def __init__(self, workload: Workload, clients: Clients) -> None:
        self.workload = workload
        self.clients = clients
        self.model = workload.model()
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.server = [p.detach().clone() for p in self.parameters]
        # of all examples of the round, even if it has other clients, too
        self.shares = [len(y) / sum(workload.sizes()) for _, y in clients]

    def flat(self) -> Tensor:
        """Return the server's model as one vector."""
        return torch.cat([p.reshape(-1) for p in self.server])


class Sequential(BareRounds):
    """Trains one client after the other, by `torch.autograd.grad` and `torch._foreach` operations.

    No module, optimizer or loader is created in a round: the practical limit for one client at a time.
    """

    def __call__(self) -> None:
        """Run a round."""
        total = [torch.zeros_like(p) for p in self.server]
        for (x, y), share in zip(self.clients, self.shares, strict=True):
            self._train(x, y)
            with torch.no_grad():
                torch._foreach_add_(total, self.parameters, alpha=share)
        self.server = total

    def _train(self, x: Tensor, y: Tensor) -> None:
        work = self.workload
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.server)
        velocity: list[Tensor] | None = None
        for xs, ys in zip(x.split(work.batch_size), y.split(work.batch_size), strict=True):
            moves = list(torch.autograd.grad(work.loss(self.model(xs), ys), self.parameters))
            with torch.no_grad():
                if work.momentum and velocity is not None:
                    torch._foreach_mul_(velocity, work.momentum)
                    torch._foreach_add_(velocity, moves)
                else:
                    velocity = moves
                torch._foreach_add_(self.parameters, velocity, alpha=-work.lr)


class Optimizer(BareRounds):
    """Trains one client after the other, by `loss.backward()` and `torch.optim.SGD`, as commonly written."""

    def __call__(self) -> None:
        """Run a round."""
        total = [torch.zeros_like(p) for p in self.server]
        size = self.workload.batch_size
        for (x, y), share in zip(self.clients, self.shares, strict=True):
            with torch.no_grad():
                for p, start in zip(self.parameters, self.server, strict=True):
                    p.copy_(start)
            optimizer = self.workload.optimizer(self.parameters)
            for xs, ys in zip(x.split(size), y.split(size), strict=True):
                optimizer.zero_grad()
                self.workload.loss(self.model(xs), ys).backward()
                optimizer.step()
            with torch.no_grad():
                for p, q in zip(self.parameters, total, strict=True):
                    q.add_(p, alpha=share)
        self.server = total


class Vmap(BareRounds):
    """Trains all clients side by side by `torch.func.vmap(grad)`, padded to the longest if their sizes differ."""

    def __init__(self, workload: Workload, clients: Clients) -> None:
        super().__init__(workload, clients)
        size = workload.batch_size
        # Full minibatches for all clients: a client without examples left has gradient zero, which changes nothing
        # without momentum.
        self.padded = len({len(y) for _, y in clients}) > 1 or len(clients[0][1]) % size > 0
        assert not (self.padded and workload.momentum), "padded clients would drift"
        longest = -(-max(len(y) for _, y in clients) // size) * size
        features, labels = clients[0]
        self.x = features.new_zeros(len(clients), longest, *features.shape[1:])
        self.y = labels.new_zeros(len(clients), longest, *labels.shape[1:])
        self.mask = torch.zeros(len(clients), longest)
        for i, (x, y) in enumerate(clients):
            self.x[i, : len(y)], self.y[i, : len(y)], self.mask[i, : len(y)] = x, y, 1.0
        self.names = [name for name, _ in self.model.named_parameters()]
        self.gradients = vmap(grad(self._loss))
        self.weights = torch.tensor(self.shares)

    def _loss(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        outputs = functional_call(self.model, parameters, (x,))
        if not self.padded:
            return self.workload.loss(outputs, y)
        return (F.cross_entropy(outputs, y, reduction="none") * mask).sum() / mask.sum().clamp_min(1.0)

    def __call__(self) -> None:
        """Run a round."""
        work = self.workload
        stacked = [p.expand(len(self.clients), *p.shape).clone() for p in self.server]
        parameters = dict(zip(self.names, stacked, strict=True))
        velocity: list[Tensor] | None = None
        for minibatch in zip(*(t.split(work.batch_size, dim=1) for t in (self.x, self.y, self.mask)), strict=True):
            gradients = self.gradients(parameters, *minibatch)
            moves = [gradients[name] for name in self.names]
            if work.momentum and velocity is not None:
                torch._foreach_mul_(velocity, work.momentum)
                torch._foreach_add_(velocity, moves)
            else:
                velocity = moves
            torch._foreach_add_(stacked, velocity, alpha=-work.lr)
        self.server = [torch.tensordot(self.weights, p, 1) for p in stacked]


class Batched(Vmap):
    """Trains all clients side by side by hand: a batched product for each layer and one autograd graph, nothing else.

    The least that a perceptron's round costs in eager torch: the limit for any loop that is not written for it alone.
    """

    def __init__(self, workload: Workload, clients: Clients) -> None:
        super().__init__(workload, clients)
        assert not self.padded, "all clients have whole minibatches"
        self.gradients = self._gradients  # type: ignore[assignment]  # in place of vmap's
        self.layers = [layer for layer in self.model if not isinstance(layer, nn.Flatten)]

    def _gradients(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
        leaves = [p.detach().requires_grad_() for p in parameters.values()]
        left = iter(leaves)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                weight = next(left)
                x = torch.baddbmm(next(left).unsqueeze(1), x, weight.mT)
            else:
                x = layer(x)
        loss = F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        return dict(zip(parameters, torch.autograd.grad(loss, leaves), strict=True))


Contenders = dict[str, type[Sequential] | type[Optimizer] | type[Vmap]]

CONTENDERS: Contenders = {"sequential": Sequential, "optimizer": Optimizer, "vmap": Vmap}
"""The bare contenders by name."""


def contenders(workload: Workload) -> Contenders:
    """Create the contenders that can run a workload."""
    return {**CONTENDERS, "hand": Batched} if workload.kind == "mlp" and not workload.sigma else CONTENDERS
