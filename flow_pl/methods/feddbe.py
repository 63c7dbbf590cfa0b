"""FedDBE: Zhang et al., Eliminating Domain Bias for Federated Learning in Representation Space (NeurIPS 2023)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.parts.body_and_head import BodyAndHead
from flow_pl.methods.parts.pieces import pieces
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_at_least_zero

BIAS = "representation_bias"
"""Name of a client's vector among the parameters trained with it; names of block parameters contain a dot."""


class FedDBE(BodyAndHead):
    """Adds a client-specific vector to the features, so that w_g's features can be similar for all clients (Section 4).

    The model is head(features(x) + z), and its loss has the term kappa / 2 * the mean square of (mean features of the
    minibatch - consensus). w and z take the same steps. The consensus is the mean of the clients' mean features, which
    are sent only once: in the first round that has clients, which trains w_g as FedAvg does.

    Stateful: a client keeps z, which is zero for one that has not been sampled yet. Personalization trains as
    in a round, starting from w_g and the client's z.

    The authors have all clients send their mean features before the first round; here the first cohort does. Their
    running mean over minibatches is replaced by the mean of the minibatch (their momentum mu = 1).

    Args:
        regularization: weight of the distance of the mean features to the consensus (kappa).
        personal_lr_scale: factor on the client optimizer's learning rate when a client is evaluated; in a round w and z
            are trained together.

    Raises:
        ConfigurationError: `regularization` is negative.
    """

    private = MappingProxyType({"bias": "bias"})
    training_only = (*BodyAndHead.training_only, "_first_round")
    needs = "head"

    def __init__(self, regularization: float = 1.0, personal_lr_scale: float = 1.0) -> None:
        super().__init__(1, personal_lr_scale)
        require_at_least_zero(regularization=regularization)
        self.regularization = regularization

    def server_modules(self) -> dict[str, nn.Module]:
        """Return the consensus."""
        return {"consensus": Consensus()}

    def initialize(self, x: Inputs) -> None:
        """Initialize the server's lazy modules."""
        super().initialize(x)
        parameters = {name: p.detach() for name, p in self.modules["global"].named_parameters()}
        self.modules["consensus"](self.model.features(x, parameters))

    def plan(self) -> None:
        """Also plan the first round."""
        super().plan()
        self._first_round = _FirstRound.of(self)

    def in_round(self, number: int, server: Groups) -> Method:
        """Return the method that collects the consensus while there is none, this one afterwards.

        By the consensus, not by the number: a round may have no client, and then collects nothing.
        """
        return self if server["consensus"]["mean"].any() else self._first_round

    def start(self, server: Groups) -> Groups:
        """Return w_g, the consensus, and a zero vector."""
        return {**server, "bias": {BIAS: torch.zeros_like(server["consensus"]["mean"])}}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w and z on all the data."""
        return (Derive("all", _join), Phase("all", (self._step(),)), Derive("all", self._part))

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Train as in a round, and keep w_g for comparison."""
        return (Derive("all", _join), Phase("all", (self.personal_step(self._step()),)))

    def personal(self, groups: Groups) -> Parameters | None:
        """Return None: a vector is added within the model."""
        return None

    def personalized(self, groups: Groups, x: Inputs) -> Tensor:
        """Compute the outputs of the personal model."""
        features = self.model.features(x, groups["whole"])
        return self.model.head(features + groups["whole"][BIAS], groups["whole"])

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the server's model without a vector, and with the personal model."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _step(self) -> Step:
        """Create a step of w and z on the loss and the distance to the consensus."""
        regularization = self.regularization  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            model = groups["whole"]
            features = self.model.features(minibatch.x, model)
            outputs = self.model.head(features + model[BIAS], model)
            total, count = self._summed(features, minibatch)
            distance = (total / count.clamp_min(1.0) - groups["consensus"]["mean"]).square().mean()
            task = self.objective.loss(outputs, minibatch.y, minibatch.mask)
            return task + regularization / 2 * distance

        return Step("whole", loss)

    def _summed(self, features: Tensor, examples: Minibatch) -> tuple[Tensor, Tensor]:
        """Sum the features [K] over real examples (tokens, in sequences), and count them."""
        real = examples.mask.bool() if features.ndim == 2 else self.objective.counted(examples.y, examples.mask)
        return features.float().where(real.unsqueeze(-1), 0.0).flatten(0, -2).sum(0), real.float().sum()

    def _part(self, groups: Groups, examples: Minibatch) -> Groups:
        return {
            "global": {name: groups["whole"][name] for name in groups["global"]},
            "bias": {BIAS: groups["whole"][BIAS]},
        }


class _FirstRound(FedDBE):
    """Trains as FedAvg, and collects the mean features of the trained model."""

    shared = MappingProxyType({"global": "global", "consensus": "consensus"})

    @staticmethod
    def of(method: FedDBE) -> _FirstRound:
        """Create the first round of a bound method."""
        first = _FirstRound(method.regularization, method.personal_lr_scale)
        vars(first).update({key: value for key, value in vars(method).items() if not key.endswith("phases")})
        Method.plan(first)
        return first

    def plan(self) -> None:
        """Plan as usual: there is no separate first round."""
        Method.plan(self)

    def training(self) -> tuple[Phase | Derive, ...]:
        """Train w on all the data, then collect the mean features."""
        return (Phase("all", (self.train_step("global"),)), Derive("all", self._collect))

    def _collect(self, groups: Groups, examples: Minibatch) -> Groups:
        """Compute the client's mean features."""
        summed = [self._summed(self.model.features(piece.x, groups["global"]), piece) for piece in pieces(examples)]
        total, count = (torch.stack(values).sum(0) for values in zip(*summed, strict=True))
        return {"consensus": {"mean": (total / count.clamp_min(1.0)).to(groups["consensus"]["mean"].dtype)}}


class Consensus(LazyModuleMixin, nn.Module):
    """Holds the mean of the clients' mean features [K], zero until collected; averaged without an optimizer."""

    averaged = True

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.UninitializedParameter(requires_grad=False)

    def initialize_parameters(self, features: Tensor) -> None:
        """Infer the shape of the features [N, ..., K]."""
        if self.has_uninitialized_params():
            self.mean.materialize((features.shape[-1],))
            nn.init.zeros_(self.mean)

    def forward(self, *args: Any) -> Tensor:
        """Return the mean."""
        return self.mean


def _join(groups: Groups, examples: Minibatch) -> Groups:
    """Copy model and vector into one group, since steps write to it."""
    return {"whole": {name: p.clone() for name, p in {**groups["global"], **groups["bias"]}.items()}}
