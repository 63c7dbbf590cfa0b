"""A round of Flow written by hand for a perceptron: what our Flow round could cost at the least in eager torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flow_pl.models.routers import InstanceRouter
from tools.benchmarks.bare import Batched
from tools.benchmarks.workloads import Clients, Workload

DROPOUT, REGULARIZATION, EPSILON = 0.3, 0.1, 1e-6


class BatchedFlow(Batched):
    """Trains local models, routers and w_g of all clients side by side, by a batched product for each layer.

    The steps, shapes and losses are those of our round; the router's dropout is torch's.
    """

    def __init__(self, workload: Workload, clients: Clients) -> None:
        super().__init__(workload, clients)
        router = InstanceRouter([layer for layer in self.layers if isinstance(layer, nn.Linear)])
        router(self.x[0])
        self.router = [p.detach().clone() for p in router.parameters()]
        self.hidden = len(router.exits.layers)

    def __call__(self) -> None:
        """Run a round."""
        count, size = len(self.clients), self.workload.batch_size
        w_g, w_l, psi = (
            [p.expand(count, *p.shape).clone() for p in group] for group in (self.server, self.server, self.router)
        )
        batches = list(zip(self.x.split(size, dim=1), self.y.split(size, dim=1), strict=True))
        half = len(batches) // 2
        for x, y in batches[:half]:
            self._step(w_l, lambda leaves, x=x, y=y: _cross_entropy(self._plain(leaves, x), y))
        for x, y in batches[half:]:
            self._step(psi, lambda leaves, x=x, y=y: self._routed_loss(leaves, w_g, w_l, x, y))
            self._step(w_g, lambda leaves, x=x, y=y: _cross_entropy(self._plain(leaves, x), y))
        self.server, self.router = ([torch.tensordot(self.weights, p, 1) for p in group] for group in (w_g, psi))

    def _step(self, parameters: list[Tensor], loss: Callable[[list[Tensor]], Tensor]) -> None:
        leaves = [p.detach().requires_grad_() for p in parameters]
        torch._foreach_add_(parameters, torch.autograd.grad(loss(leaves), leaves), alpha=-self.workload.lr)

    def _plain(self, parameters: Sequence[Tensor], x: Tensor) -> Tensor:
        left = iter(parameters)
        for layer in self.layers:
            x = _linear(x, next(left), next(left)) if isinstance(layer, nn.Linear) else layer(x)
        return x

    def _routed_loss(
        self, psi: Sequence[Tensor], w_g: Sequence[Tensor], w_l: Sequence[Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        h, hidden = x, []
        for i in range(self.hidden):
            h = F.dropout(_linear(h, psi[2 * i], psi[2 * i + 1]).relu(), DROPOUT)
            hidden.append(h)
        exits = len(psi) // 2 - self.hidden
        heads = range(2 * self.hidden, len(psi), 2)
        logits = [_linear(h, psi[i], psi[i + 1]) for h, i in zip(hidden[-exits:], heads, strict=True)]
        q = torch.stack(logits, dim=-2).softmax(-1)
        block = 0
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                both = [_linear(x, group[2 * block], group[2 * block + 1]) for group in (w_g, w_l)]
                x = q[..., block, :1] * both[0] + q[..., block, 1:] * both[1]
                block += 1
            else:
                x = layer(x)
        regularizer = -(q[..., 0].square() + EPSILON).log().mean(-1)
        return _cross_entropy(x, y) + REGULARIZATION * regularizer.sum() / y.shape[1]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    """Sum the clients' mean losses."""
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
