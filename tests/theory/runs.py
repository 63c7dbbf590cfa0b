"""Rounds of the project's own loop and server on a known problem, and slopes of what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from flow_pl.checks import check_fit
from flow_pl.data.batch import ClientBatch
from flow_pl.engine.loop import FederatedLoop
from flow_pl.engine.server_round import ServerRound, server_groups
from flow_pl.methods import FedAvg, Flow
from flow_pl.methods.base import Method
from flow_pl.models import LogisticRegression
from flow_pl.models.routers import Route, Router
from flow_pl.tasks import Classification
from tests.theory.problems import LeastSquares, Logistic, Quadratics, linear


class ConstantRouter(Router):
    """The same probability for all instances; its logit is trained as any router's parameters are."""

    def __init__(self, blocks: Sequence[nn.Module], q_local: float = 0.5) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.logit(torch.tensor([q_local])))

    def bind(self, parameters: dict[str, Tensor] | None, x: Tensor) -> Route:
        logit = self.logit if parameters is None else parameters["logit"]
        q = torch.cat([-logit / 2, logit / 2]).softmax(0).expand(len(x), 2)
        return lambda block, inputs, on_global, on_local: q


def flow(q_local: float = 0.5, adapt_router: bool = False, **settings: object) -> Flow:
    """Flow with a constant router."""
    router = partial(ConstantRouter, q_local=q_local)
    return Flow(router=router, adapt_router=adapt_router, **settings)  # type: ignore[arg-type]


METHODS = {
    "FedAvg": FedAvg,
    "Flow, parts": partial(flow, split="parts", encourage="local", regularization=0.01),
    "Flow, none": partial(flow, split="none"),
    "Flow, cross": partial(flow, split="cross"),
}
"""By name; all train w_g on data of the same loss."""


def gradient_descent(lr: float, steps: int, batch_size: int = 1000, weight_decay: float = 0.0) -> FederatedLoop:
    """A loop of plain gradient steps of each kind, by default on all of a client's examples."""
    make = partial(torch.optim.SGD, lr=lr, weight_decay=weight_decay)
    return FederatedLoop(steps, None, batch_size, make, weighting="uniform", trace_after=None)


def on_quadratics(method: Method, problem: Quadratics) -> Method:
    """The method bound to a linear model, started at 0."""
    d = problem.c.shape[1]
    method = method.bind(linear(d), LeastSquares())
    check_fit(method, torch.zeros(1, d), 1)
    return method


def on_logistic(method: Method, problem: Logistic) -> Method:
    """The method bound to logistic regression, started at 0."""
    d = problem.x.shape[-1]
    backbone = LogisticRegression(d, 2)
    for p in backbone.parameters():
        nn.init.zeros_(p)
    method = method.bind(backbone, Classification())
    check_fit(method, torch.zeros(1, d), 2)
    return method


def weights(method: Method) -> Tensor:
    """w_g, flat, in double precision."""
    return torch.cat([p.flatten() for p in server_groups(method)["global"].values()]).double()


def place(method: Method, w: Tensor) -> Method:
    """Put w_g where a run is to start."""
    start = 0
    with torch.no_grad():
        for p in method.modules["global"].parameters():
            p.copy_(w[start : start + p.numel()].view(p.shape))
            start += p.numel()
    return method


def federate(
    method: Method, loop: FederatedLoop, batch: ClientBatch, rounds: int, shuffle: bool = False
) -> list[Tensor]:
    """Rounds with all clients and the server step of FedAvg; w_g before the first round and after each.

    Args:
        method: bound to a model.
        loop: how clients train.
        batch: all clients.
        rounds: how many.
        shuffle: whether the examples come in another order in every epoch of every round.
    """
    trajectory = [weights(method)]
    for number in range(rounds):
        if shuffle:
            keys = torch.rand(batch.order.shape, generator=torch.Generator().manual_seed(number))
            batch = replace(batch, order=keys.argsort(-1))
        server_round = ServerRound(method)
        server_round.add(loop.train_clients(method, server_groups(method), batch))
        server_round.finish(lambda total: total, number)
        with torch.no_grad():
            for module in method.modules.values():
                for p in module.parameters():
                    if p.grad is not None:
                        p -= p.grad
        trajectory.append(weights(method))
    return trajectory


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares exponent s of y = a x^s."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
