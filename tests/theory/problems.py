"""Federations with an exact optimum: quadratics in closed form, logistic regression by Newton's method.

References are in double precision and share no code with the project; what is measured goes through its real loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flow_pl.data.batch import GLOBAL, LOCAL, ClientBatch, Examples
from flow_pl.tasks import Classification

ORDERS = 64
"""Orders of the examples in a batch: as many local epochs can be run."""


class LeastSquares(Classification):
    """Half the squared error; outputs [N, 1]."""

    def losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - y).square() / 2

    def check(self, outputs: Tensor, num_classes: int) -> None:
        pass


def full_batch(x: Tensor, y: Tensor, heldout: tuple[Tensor, Tensor] | None = None) -> ClientBatch:
    """A chunk of all clients: the first half of a client's rows is its local part, the rest the global one.

    Args:
        x: features [C, N, d].
        y: targets [C, N].
        heldout: features and targets to evaluate on; the global part by default.
    """
    clients, n = y.shape
    part = torch.full((clients, n), GLOBAL, dtype=torch.uint8)
    part[:, : n // 2] = LOCAL
    return ClientBatch(
        client=torch.arange(clients),
        train=_examples(x, y),
        part=part,
        order=torch.arange(n).expand(clients, ORDERS, n),
        heldout=_examples(*((x[:, n // 2 :], y[:, n // 2 :]) if heldout is None else heldout)),
        round=0,
        key=torch.arange(clients),
    )


def _examples(x: Tensor, y: Tensor) -> Examples:
    targets = y.float() if y.is_floating_point() else y
    return Examples(x.float(), targets, torch.ones(y.shape, dtype=torch.bool), (y.shape[1],) * len(y))


@dataclass(frozen=True)
class Quadratics:
    """f_m(w) = (w - c_m)' A_m (w - c_m) / 2, F their mean.

    Attributes:
        A: Hessians [C, d, d].
        c: minima [C, d].
    """

    A: Tensor
    c: Tensor

    @classmethod
    def make(
        cls, heterogeneity: float, eigenvalues: Sequence[float], clients: int = 6, spread: float = 0.5
    ) -> Quadratics:
        """Clients whose minima lie around (1, ..., 1), the optimum of F whatever the heterogeneity.

        Args:
            heterogeneity: scale of the clients' gradients at the optimum: G is proportional to it.
            eigenvalues: of the mean Hessian.
            clients: how many.
            spread: of the Hessians, client by client and direction by direction; 0 for the same one everywhere.
        """
        random = torch.Generator().manual_seed(3)
        d = len(eigenvalues)
        A = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
        scales = 1 + spread * torch.linspace(-1, 1, clients, dtype=torch.float64)
        signs = torch.linspace(-1, 1, d, dtype=torch.float64)
        tilt = spread / 2 * torch.outer(torch.linspace(1, -1, clients, dtype=torch.float64), signs)
        hessians = (scales[:, None] + tilt)[:, :, None] * A
        pull = torch.randn(clients, d, generator=random, dtype=torch.float64)
        pull -= pull.mean(0)  # the clients' gradients at the optimum, which add up to 0
        pull = pull / pull.square().sum(1).mean().sqrt()
        minima = 1 + heterogeneity * torch.linalg.solve(hessians, pull)
        return cls(hessians, minima)

    def batch(self) -> ClientBatch:
        """Rows x with x'x / n = A_m and targets x c_m, the same in both parts."""
        root = torch.linalg.cholesky(self.A).mT * self.A.shape[1] ** 0.5
        x = torch.cat([root, root], dim=1)
        return full_batch(x, (x @ self.c[:, :, None]).squeeze(-1))

    def optimum(self) -> Tensor:
        """The minimum of F."""
        return torch.linalg.solve(self.A.mean(0), (self.A @ self.c[:, :, None]).squeeze(-1).mean(0))

    def losses(self, w: Tensor) -> Tensor:
        """f_m(w) [C], of w [d] or [C, d]."""
        e = w - self.c
        return torch.einsum("ci,cij,cj->c", e, self.A, e) / 2

    def gradients(self, w: Tensor) -> Tensor:
        """grad f_m(w) [C, d], of w [d] or [C, d]."""
        return torch.einsum("cij,cj->ci", self.A, w - self.c)

    def suboptimality(self, w: Tensor) -> float:
        """F(w) - F*, without cancellation."""
        e = w - self.optimum()
        return float(e @ self.A.mean(0) @ e / 2)

    def squared_gradient(self, w: Tensor) -> float:
        """||grad F(w)||^2."""
        return float(self.gradients(w).mean(0).square().sum())

    def dissimilarity(self) -> float:
        """G^2 of the heterogeneity at the optimum: the mean of ||grad f_m(w*)||^2."""
        return float(self.gradients(self.optimum()).square().sum(1).mean())

    def curvature(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of any client's Hessian: mu and beta."""
        eigenvalues = torch.linalg.eigvalsh(self.A)
        return float(eigenvalues.min()), float(eigenvalues.max())

    def local_steps(self, lr: float, steps: int) -> Tensor:
        """(I - lr A_m)^steps [C, d, d]: what is left of a client's distance to its minimum."""
        return torch.linalg.matrix_power(torch.eye(self.A.shape[1]) - lr * self.A, steps)

    def trained(self, w: Tensor, lr: float, steps: int) -> Tensor:
        """Every client's model after its gradient steps from w, [C, d]."""
        return self.c + (self.local_steps(lr, steps) @ (w - self.c)[:, :, None]).squeeze(-1)

    def fixed_point(self, lr: float, steps: int) -> Tensor:
        """Where the mean of the clients' models stays."""
        left = torch.eye(self.A.shape[1]) - self.local_steps(lr, steps)
        return torch.linalg.solve(left.mean(0), (left @ self.c[:, :, None]).squeeze(-1).mean(0))


@dataclass(frozen=True)
class Logistic:
    """L2-regularized logistic regression, F(w) = mean over clients of the cross-entropy + mu / 2 ||w||^2.

    Attributes:
        x: features [C, N, d].
        y: labels [C, N], 0 or 1.
        mu: weight of the regularizer, as the client optimizer's weight decay.
    """

    x: Tensor
    y: Tensor
    mu: float = 0.1

    @classmethod
    def make(
        cls, heterogeneity: float, spread: float = 0.5, clients: int = 6, rows: int = 40, features: int = 4
    ) -> Logistic:
        """Clients with the same features on scales of their own, labelled by a common direction and one of their own.

        Args:
            heterogeneity: weight of a client's own direction; 0 for the same labels everywhere.
            spread: of the scales; with the same features everywhere the Hessians at the optimum would be the same too,
                and the clients' steps cancel to first order.
            clients: how many.
            rows: examples of each, half of them a copy of the others.
            features: of an example.
        """
        random = torch.Generator().manual_seed(4)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        x, noise = draw(rows // 2, features), 0.5 * draw(rows // 2)
        scales = 1 + spread * torch.linspace(-1, 1, clients, dtype=torch.float64)
        own = draw(clients, features)
        directions = 1 + heterogeneity * (own - own.mean(0))
        y = (x @ directions.T + noise[:, None] > 0).long().T
        return cls(scales[:, None, None] * torch.cat([x, x]), torch.cat([y, y], dim=1))

    def batch(self) -> ClientBatch:
        """The clients."""
        return full_batch(self.x, self.y)

    def client_losses(self, w: Tensor) -> Tensor:
        """f_m(w) [C], for w = [weights of two classes, biases], flat."""
        d = self.x.shape[-1]
        scores = self.x @ w[: 2 * d].view(2, d).T + w[2 * d :]
        return F.cross_entropy(scores.mT, self.y, reduction="none").mean(1) + self.mu / 2 * w.square().sum()

    def loss(self, w: Tensor) -> Tensor:
        """F(w)."""
        return self.client_losses(w).mean()

    @cached_property
    def optimum(self) -> Tensor:
        """By Newton's method, to double precision."""
        w = torch.zeros(2 * self.x.shape[-1] + 2, dtype=torch.float64)
        for _ in range(20):
            step = torch.linalg.solve(torch.func.hessian(self.loss)(w), torch.func.grad(self.loss)(w))
            w = w - step
        assert torch.func.grad(self.loss)(w).norm() < 1e-12
        return w

    def suboptimality(self, w: Tensor) -> float:
        """F(w) - F*."""
        return float(self.loss(w) - self.loss(self.optimum))

    def squared_gradient(self, w: Tensor) -> float:
        """||grad F(w)||^2."""
        return float(torch.func.grad(self.loss)(w).square().sum())

    def heterogeneity(self) -> float:
        """G^2 at the optimum: the mean of ||grad f_m||^2."""
        return float(torch.func.jacrev(self.client_losses)(self.optimum).square().sum(1).mean())


def noisy_local_part(problem: Quadratics, noise: float) -> ClientBatch:
    """The quadratics, but every client's local part has targets for a minimum that is off by noise."""
    batch = problem.batch()
    random = torch.Generator().manual_seed(5)
    n, wrong = batch.train.y.shape[1] // 2, noise * torch.randn(problem.c.shape, generator=random)
    y = batch.train.y.clone()
    y[:, :n] += (batch.train.x[:, :n] @ wrong[:, :, None]).squeeze(-1)
    return replace(batch, train=replace(batch.train, y=y))


def linear(d: int) -> nn.Module:
    """The model of `Quadratics`, started at 0."""
    block = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(block.weight)
    return nn.Sequential(block)
