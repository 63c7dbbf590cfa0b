"""Ditto: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization (ICML 2021)."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor

from flow_pl.methods.base import Method, Prediction
from flow_pl.methods.parts.regularizers import half_squared_distance
from flow_pl.methods.steps import Derive, Minibatch, Phase, Step
from flow_pl.utils.groups import Groups, Parameters
from flow_pl.utils.inputs import Inputs
from flow_pl.utils.validation import require_at_least_zero


class Ditto(Method):
    """Trains w_g and, on every client, a personal model kept close to the w_g it received (Algorithm 1).

    Stateful: a client keeps its personal model. A client that has not been sampled yet starts from w_g.

    Args:
        regularization: weight of the distance to w_g (lambda; published by Flow's authors for this baseline: 0.1,
            CIFAR 0.01); 0 trains the personal model alone.
        personal_lr_scale: factor on the client optimizer's learning rate for the personal model.
    """

    private = MappingProxyType({"personal": "personal"})

    def __init__(self, regularization: float = 0.1, personal_lr_scale: float = 1.0) -> None:
        super().__init__(personal_lr_scale)
        require_at_least_zero(regularization=regularization)
        self.regularization = regularization

    def start(self, server: Groups) -> Groups:
        """Return w_g, as received and to be trained, and a personal model initialized from it."""
        return {**server, "received": server["global"], "personal": server["global"]}

    def training(self) -> tuple[Phase | Derive, ...]:
        """Take a step of w_g and one of the personal model on every minibatch."""
        return (Phase("all", (self.train_step("global"), self._personal_step())),)

    def personalization(self) -> tuple[Phase | Derive, ...]:
        """Take the personal model's steps only."""
        return (Phase("all", (self._personal_step(),)),)

    def personal(self, groups: Groups) -> Parameters | None:
        """Return the personal model."""
        return groups["personal"]

    def predict(self, groups: Groups, x: Inputs) -> Prediction:
        """Predict with the personal model."""
        personal = self.personalized(groups, x)
        return Prediction(self.model.plain(x, groups["global"]), personal, local=personal)

    def _personal_step(self) -> Step:
        """Create a step on f(v) + lambda / 2 * ||v - w||^2, w as received."""
        regularization = self.regularization  # fixed now: a traced step could not follow a change

        def loss(groups: Groups, minibatch: Minibatch) -> Tensor:
            distance = half_squared_distance(groups["personal"], groups["received"])
            return self.loss(minibatch, groups["personal"]) + regularization * distance

        return self.personal_step(Step("personal", loss))
