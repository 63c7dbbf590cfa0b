"""FedALA: Zhang et al., FedALA: Adaptive Local Aggregation for Personalized Federated Learning (AAAI 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from flow_pl.methods.base import Prediction
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_count, require_positive


class FedALA(BodyAndHead):
    """Starts each client's round from an element-wise mixture of w_g and the client's own model (Algorithm 1).

    The lower blocks are the server's. In the upper ones each parameter is own + (w_g - own) * W, with a weight in W of
    0 to 1 for each, learned on the client's data while both models are frozen. Then the whole mixture is trained
    and sent.

    Stateful: a client keeps its model and W. A client that has not been sampled yet keeps w_g, with which every mixture
    is w_g, and W = 1. The personal model is made as in a round.

    The authors learn W on a random share of the data, to convergence in a client's second round and for one pass later;
    here W is learned on all the data, for the same number of passes in every round.

    Args:
        head_blocks: how many of the last blocks with parameters are mixed (p), or the names of the submodules
            that are.
        weight_epochs: epochs of training W, before those on the model.
        weight_lr: learning rate of W, by plain SGD (eta; published: 1).
        personal_lr_scale: factor on the client optimizer's learning rate for the model when a client is evaluated;
            not used in a round, where the model is what the client sends.

    Raises:
        ConfigurationError: a value is out of range.
    """

    shared = MappingProxyType({"global": "model"})
    private = MappingProxyType({"own": "model", "weights": "weights"})

    def __init__(
        self,
        head_blocks: int | Sequence[str] = 1,
        weight_epochs: int = 1,
        weight_lr: float = 1.0,
        personal_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(head_blocks, personal_lr_scale)
        require_count(weight_epochs=weight_epochs)
        require_positive(weight_lr=weight_lr)
        self.weight_epochs = weight_epochs
        self.weight_lr = weight_lr

    def start(self, server: Groups) -> Groups:
        """Return w_g three times: as received, as the client's own and as the model to train; W = 1."""
        w_g = server["global"]
        weights = {name: torch.ones_like(w_g[name]) for name in self._head}
        return {**server, "own": w_g, "model": w_g, "weights": weights}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train the weights, mix, and train the whole model."""
        return self._stages(self.train_step("model"))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Do the same as in a round, without keeping anything."""
        return self._stages(self.personal_step(self.train_step("model")))

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the client's model."""
        return groups["model"]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the client's model."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _stages(self, step: Step) -> tuple[Phase | Derive, ...]:
        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            return self.loss(minibatch, _mixture(groups))

        optimizer = partial(torch.optim.SGD, lr=self.weight_lr)
        learn = Step("weights", loss, bounds=(0.0, 1.0), optimizer=optimizer)
        return (
            Phase("all", (learn,), self.weight_epochs),
            Derive("all", _begin),
            Phase("all", (step,)),
        )


def _begin(groups: Groups, examples: Minibatch) -> Groups:
    """Copy the model to be trained, since steps write to it."""
    return {"model": {name: p.clone() for name, p in _mixture(groups).items()}}


def _mixture(groups: Groups) -> Parameters:
    """Combine the server's lower blocks with own + (w_g - own) * W in the upper ones."""
    w_g, own = groups["global"], groups["own"]
    return {**w_g, **{name: own[name].lerp(w_g[name], weight) for name, weight in groups["weights"].items()}}
