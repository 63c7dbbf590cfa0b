"""Per-FedAvg: Fallah et al., Personalized Federated Learning with Theoretical Guarantees (NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from flow_pl.methods.fine_tuning import FineTuning
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import take, zip_inputs
from flow_pl.utils.validation import require_at_least_zero

INNER_SCALE = 2.0**10
"""Factor on the inner loss, which is removed from its gradient. Float16 would lose small gradients, and 16-mixed scales
only the outer loss; in other types a power of two changes no digit."""


class PerFedAvg(FineTuning):
    """Trains w_g to be a good start for fine-tuning: MAML, federated (Algorithm 1, with the first-order gradient, FO).

    On each minibatch w' = w - alpha * grad f(w; one half), then w <- w - beta * grad f(w'; other half), where w' is
    treated as w plus a constant (no second derivatives). The client optimizer makes the second step; beta is its
    learning rate. The personal model is w_g after plain SGD steps at rate alpha on the client's minibatches. Stateless.

    Args:
        alpha: learning rate of the inner step and of fine-tuning (published: 0.01, with beta 0.001); if 0,
            personalized = generalized.
    """

    budget: ClassVar[tuple[str, ...]] = ("alpha",)

    def __init__(self, alpha: float = 0.01) -> None:
        require_at_least_zero(alpha=alpha)
        self.alpha = alpha

    def start(self, server: Groups) -> Groups:
        """Return w_g, and a full copy of it: as in the inner step, embedding tables are trained too."""
        return {**server, "local": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w_g on all the data."""
        return (Phase("all", (self._meta_step(),)),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Fine-tune the local model on all the data by the inner step."""
        inner = replace(self.train_step("local"), optimizer=partial(torch.optim.SGD, lr=self.alpha))
        return (Phase("all", (inner,)),)

    def _meta_step(self) -> Step:
        """Create a step on f(w'), w' = w - alpha * grad f(w), with that gradient held constant."""
        alpha = self.alpha  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            first, second = halves(minibatch)
            w = groups["global"]
            gradient = self._inner_gradient(w, first)
            return self.loss(second, {name: p - alpha / INNER_SCALE * gradient[name] for name, p in w.items()})

        return Step("global", loss)

    def _inner_gradient(self, w: Parameters, minibatch: Minibatch) -> Parameters:
        """Compute INNER_SCALE times the gradient of the loss, detached from w.

        Uses torch.func, since autograd's own functions do not work on one client's share of a vectorized step.
        """
        constant = {name: p.detach() for name, p in w.items()}
        loss, pull_back = torch.func.vjp(lambda v: self.loss(minibatch, v), constant)  # type: ignore[misc]
        with torch.no_grad():  # otherwise the gradient is differentiable, which is three times as slow for an LSTM
            gradient: Parameters = pull_back(torch.full_like(loss, INNER_SCALE))[0]
        return gradient


def halves(minibatch: Minibatch) -> tuple[Minibatch, Minibatch]:
    """Split a minibatch, real examples first, into even and odd rows; a single example is in both halves."""
    every = (slice(start, None, 2) for start in (0, 1))
    even, odd = (Minibatch(take(minibatch.x, rows), minibatch.y[rows], minibatch.mask[rows]) for rows in every)
    if not len(odd.mask):
        return even, even
    empty = ~odd.mask.any()

    def either(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(empty, a[: len(b)], b)

    return even, Minibatch(zip_inputs(either, even.x, odd.x), either(even.y, odd.y), either(even.mask, odd.mask))
